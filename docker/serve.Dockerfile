# The model's server for hosts without a GPU: base, and transformers 5 with what `transformers serve` needs. (On a GPU the
# training image serves, with its vLLM.) Base's own torch decides the version of transformers, see the constraints: a newer
# torch beside it would weigh as much again.
ARG BASE=agentgym-rl/base:latest
FROM ${BASE}

SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
# hadolint ignore=DL3002
USER 0

# requests: transformers' command line imports it and does not ask for it.
RUN --mount=type=bind,source=docker/constraints/serve.txt,target=/run/serve.txt \
    --mount=type=cache,target=/var/cache/uv \
    --mount=type=secret,id=package_index --mount=type=secret,id=ca_bundle \
    torch=$(python -c 'import importlib.metadata as m; print(m.version("torch"))'); \
    echo "torch==${torch}" >/run/torch.txt; \
    with-secrets uv pip install --compile-bytecode --constraint /run/torch.txt --constraint /run/serve.txt \
        accelerate requests 'transformers[serving]'; \
    rm /run/torch.txt

COPY scripts/serve_transformers.py /opt/workbench/scripts/serve_transformers.py

# With a home of its own: a cache that this user left in the real one would be closed to every other user.
RUN home=$(mktemp -d); \
    HOME=$home python -c 'import accelerate; from transformers import AutoModelForCausalLM, AutoProcessor'; \
    HOME=$home transformers serve --help >/dev/null; \
    rm -r "$home"
USER 1000

ARG REVISION=unknown
ARG SOURCE_URL=unknown
LABEL org.opencontainers.image.title="AgentGym-RL serve" \
      org.opencontainers.image.source="${SOURCE_URL}" \
      org.opencontainers.image.revision="${REVISION}"
CMD ["python", "/opt/workbench/scripts/serve_transformers.py", "--help"]
