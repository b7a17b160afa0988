# The training image: base, verl as AgentGym-RL carries it, and AgentGym's client package agentenv.
#
# Named build contexts: `agentgym-rl` and `agentgym` are the two repositories, a folder or a pinned git URL.
ARG BASE=agentgym-rl/base:latest
FROM ${BASE}

SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
# hadolint ignore=DL3002
USER 0

# spawn: a forked vLLM worker cannot touch CUDA again. XFORMERS: the attention backend AgentGym-RL trains with. What
# wandb and Ray write outlives the container: wandb's offline run in saves/wandb, Ray's logs in saves/ray.
ENV HYDRA_FULL_ERROR=1 \
    PYTHONPATH=/opt/workbench \
    RAY_TMPDIR=/workspace/saves \
    RAY_USAGE_STATS_ENABLED=0 \
    VLLM_ATTENTION_BACKEND=XFORMERS \
    VLLM_USE_MODELSCOPE=0 \
    VLLM_WORKER_MULTIPROC_METHOD=spawn \
    WANDB_DIR=/workspace/saves

# What verl asks for, from its pyproject.toml alone: a change in its source leaves this layer cached. The
# constraints matter: unpinned, the resolver picks a vllm of 2023 and a pyarrow that breaks datasets. Bytecode is
# compiled here, because the plain user cannot write it later and every start would do without.
RUN --mount=type=bind,from=agentgym-rl,source=AgentGym-RL/pyproject.toml,target=/run/verl/pyproject.toml \
    --mount=type=bind,source=docker/constraints/train.txt,target=/run/train.txt \
    --mount=type=cache,target=/var/cache/uv \
    --mount=type=secret,id=package_index --mount=type=secret,id=ca_bundle \
    torch=$(python -c 'import importlib.metadata as m; print(m.version("torch"))'); \
    echo "torch==${torch}" >/run/torch.txt; \
    with-secrets uv pip install --compile-bytecode \
        --constraint /run/torch.txt --constraint /run/train.txt \
        --requirements /run/verl/pyproject.toml transformers; \
    rm /run/torch.txt

# agentenv without its dependencies: they (trl, deepspeed, tensorboard) are for its own trainer, and the client
# that verl imports needs none of them. The example scripts speak of models/ and saves/ beside verl, hence the links.
# outputs: where Hydra makes its folder for each start, in whatever folder that was; a plain user cannot make it there.
COPY --from=agentgym agentenv /workspace/AgentGym/agentenv
COPY --from=agentgym-rl examples /workspace/examples
# By name: whoever trained in the checkout has saves/, data and .env there, which must not get into an image.
COPY --from=agentgym-rl AgentGym-RL/*.py AgentGym-RL/*.toml AgentGym-RL/*.txt AgentGym-RL/*.md AgentGym-RL/*LICENSE* \
     /workspace/AgentGym-RL/
COPY --from=agentgym-rl AgentGym-RL/scripts /workspace/AgentGym-RL/scripts
COPY --from=agentgym-rl AgentGym-RL/verl /workspace/AgentGym-RL/verl
RUN --mount=type=cache,target=/var/cache/uv \
    uv pip install --no-deps --no-build-isolation --editable /workspace/AgentGym-RL --editable /workspace/AgentGym/agentenv; \
    for folder in models saves data AgentItemId AgentEval; do \
        [ -e "/workspace/AgentGym-RL/$folder" ] || ln -s "../$folder" "/workspace/AgentGym-RL/$folder"; \
    done; \
    install -d -m 1777 /workspace/saves; \
    ln -s saves /workspace/outputs; \
    ln -s ../saves /workspace/AgentGym-RL/outputs

# With a home of its own: a cache that this user left in the real one would be closed to every other user.
RUN home=$(mktemp -d); \
    HOME=$home python -c 'import agentenv, transformers, verl.agent_trainer.main_ppo; print("transformers", transformers.__version__)'; \
    rm -r "$home"

COPY --chmod=755 docker/with-keys /usr/local/bin/with-keys
COPY training /opt/workbench/training
ENTRYPOINT ["with-keys"]
USER 1000

ARG REVISION=unknown
ARG SOURCE_URL=unknown
ARG AGENTGYM_RL_REVISION=unknown
ARG AGENTGYM_REVISION=unknown
LABEL org.opencontainers.image.title="AgentGym-RL train" \
      org.opencontainers.image.source="${SOURCE_URL}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.agentgym-rl.agentgym-rl.revision="${AGENTGYM_RL_REVISION}" \
      org.agentgym-rl.agentgym.revision="${AGENTGYM_REVISION}"
