# CUDA, Python, torch and flash-attn: what training and merging share.
#
# No "# syntax=" line anywhere: it would make every build fetch a frontend, and the engine's own (23 or newer)
# knows all that these files use.
ARG BASE_IMAGE=nvidia/cuda:12.4.1-devel-ubuntu22.04
FROM ${BASE_IMAGE}

SHELL ["/bin/bash", "-euo", "pipefail", "-c"]

# gcc: Triton compiles its launchers at run time, with Python's headers. A base image that brings its own
# Python of that version (python:3.10-slim) keeps it.
ARG PYTHON_VERSION=3.10
RUN --mount=type=cache,target=/var/cache/apt,sharing=locked \
    --mount=type=cache,target=/var/lib/apt/lists,sharing=locked \
    rm -f /etc/apt/apt.conf.d/docker-clean; \
    packages=(bash-completion ca-certificates curl gcc git less libc6-dev procps); \
    if ! command -v "python${PYTHON_VERSION}" >/dev/null; then \
        packages+=("python${PYTHON_VERSION}" "python${PYTHON_VERSION}-dev" "python${PYTHON_VERSION}-venv"); \
    elif [ -d "/usr/lib/python${PYTHON_VERSION}" ]; then \
        packages+=("python${PYTHON_VERSION}-dev" "python${PYTHON_VERSION}-venv"); \
    fi; \
    apt-get update -qq; \
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${packages[@]}"

# Ids are chosen at run time (`--user`, compose's `user:`), so the home is everybody's, and USER is set because
# getpass.getuser(), which torch's compiler calls, fails for an id that /etc/passwd does not know.
RUN useradd --uid 1000 --user-group --create-home --shell /bin/bash agentgym \
 && install -d -m 1777 /workspace \
 && chmod 1777 /home/agentgym
ENV HOME=/home/agentgym \
    USER=agentgym \
    VIRTUAL_ENV=/opt/venv \
    PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    UV_LINK_MODE=copy \
    UV_CACHE_DIR=/var/cache/uv

COPY --chmod=755 docker/with-secrets /usr/local/bin/with-secrets
RUN --mount=type=bind,source=docker/constraints/base.txt,target=/run/base.txt \
    --mount=type=cache,target=/root/.cache/pip \
    --mount=type=secret,id=package_index --mount=type=secret,id=ca_bundle \
    "python${PYTHON_VERSION}" -m venv /opt/venv; \
    HOME=/root with-secrets pip install --quiet --disable-pip-version-check --constraint /run/base.txt uv

# unsafe-best-match: torch's own index also carries old copies of PyPI packages, and by default uv would look
# for the pinned ones there only. Every version is pinned, so the better match is the same release, built for CUDA.
ARG TORCH_VERSION=2.4.0
ARG TORCHVISION_VERSION=0.19.0
ARG TORCH_INDEX_URL=https://download.pytorch.org/whl/cu124
RUN --mount=type=bind,source=docker/constraints/base.txt,target=/run/base.txt \
    --mount=type=cache,target=/var/cache/uv \
    --mount=type=secret,id=package_index --mount=type=secret,id=ca_bundle \
    index=(); \
    if [ -n "${TORCH_INDEX_URL}" ]; then index=(--extra-index-url "${TORCH_INDEX_URL}" --index-strategy unsafe-best-match); fi; \
    with-secrets uv pip install "${index[@]}" --constraint /run/base.txt \
        "torch==${TORCH_VERSION}" "torchvision==${TORCHVISION_VERSION}" numpy einops packaging setuptools wheel

# The release wheel: building flash-attn takes an hour and more. --no-deps: it asks for torch and einops, above.
ARG FLASH_ATTN_WHEEL=https://github.com/Dao-AILab/flash-attention/releases/download/v2.7.3/flash_attn-2.7.3%2Bcu12torch2.4cxx11abiFALSE-cp310-cp310-linux_x86_64.whl
RUN --mount=type=cache,target=/var/cache/uv \
    --mount=type=secret,id=package_index --mount=type=secret,id=ca_bundle \
    if [ -z "${FLASH_ATTN_WHEEL}" ]; then \
        echo "flash-attn: skipped, FLASH_ATTN_WHEEL is empty"; \
    else \
        with-secrets uv pip install --no-deps "flash-attn @ ${FLASH_ATTN_WHEEL}"; \
    fi

# As root, so that the bytecode of what was imported stays; with a home of its own, so that no cache does.
RUN home=$(mktemp -d); \
    HOME=$home python -c 'import torch, torchvision; print("torch", torch.__version__, "CUDA", torch.version.cuda)'; \
    rm -r "$home"

# Last, so that a new commit changes no layer above.
ARG REVISION=unknown
ARG SOURCE_URL=unknown
ARG BASE_IMAGE
LABEL org.opencontainers.image.title="AgentGym-RL base" \
      org.opencontainers.image.source="${SOURCE_URL}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.base.name="${BASE_IMAGE}" \
      org.agentgym-rl.python="${PYTHON_VERSION}" \
      org.agentgym-rl.torch="${TORCH_VERSION}"
WORKDIR /workspace
USER 1000
CMD ["bash"]
