# The tools image: base, the checkpoint merger and what it reads and writes with, and yapf for the formatter.
ARG BASE=agentgym-rl/base:latest
FROM ${BASE}

SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
# hadolint ignore=DL3002
USER 0

RUN --mount=type=bind,source=docker/constraints/scripts.txt,target=/run/scripts.txt \
    --mount=type=cache,target=/var/cache/uv \
    --mount=type=secret,id=package_index --mount=type=secret,id=ca_bundle \
    torch=$(python -c 'import importlib.metadata as m; print(m.version("torch"))'); \
    echo "torch==${torch}" >/run/torch.txt; \
    with-secrets uv pip install --constraint /run/torch.txt --constraint /run/scripts.txt \
        accelerate huggingface_hub ml_dtypes peft rich safetensors transformers yapf; \
    rm /run/torch.txt

COPY --chmod=755 docker/format-source docker/merge-checkpoint /usr/local/bin/
COPY scripts /opt/workbench/scripts

# With a home of its own: a cache that this user left in the real one would be closed to every other user.
RUN home=$(mktemp -d); \
    HOME=$home python -c 'import accelerate, huggingface_hub, ml_dtypes, peft, rich, safetensors.torch, transformers, yapf'; \
    HOME=$home python /opt/workbench/scripts/model_merger.py --help >/dev/null; \
    rm -r "$home"
USER 1000

ARG REVISION=unknown
ARG SOURCE_URL=unknown
LABEL org.opencontainers.image.title="AgentGym-RL scripts" \
      org.opencontainers.image.source="${SOURCE_URL}" \
      org.opencontainers.image.revision="${REVISION}"
