# syntax=docker/dockerfile:1
# One file, two images:
#
#   docker build --target cpu --build-arg TORCH_INDEX=URL -t vitrine:cpu .
#   docker build --target cuda -t vitrine:cuda .
#
# URL is the package index that serves torch's CPU builds (pytorch.org names it under "Get
# started"); without it pip would bring gigabytes of CUDA, and the build stops and says so.
#
#   docker run --read-only --tmpfs /tmp --cap-drop ALL --security-opt no-new-privileges \
#              -p 127.0.0.1:8000:8000 vitrine:cpu
#
# deploy/README.md has the rest: models, volumes, stopping. deploy/verify-image.sh builds and runs
# this file on a machine without a container engine.

# Pin it by digest where builds must repeat: --build-arg BASE=debian@sha256:...
ARG BASE=debian:bookworm-slim

# What both images stand on. libgomp1: for torch's own loops, where a wheel does not bring it.
FROM ${BASE} AS base
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 libgomp1 \
    && rm -rf /var/lib/apt/lists/* /var/cache/* /var/log/* \
    && useradd --uid 10001 --user-group --no-create-home --home-dir /cache vitrine \
    && install --directory --owner vitrine --group vitrine --mode 0750 /cache \
    && install --directory /models
COPY deploy/image/healthcheck.py /usr/local/lib/vitrine/healthcheck.py
# Everything that is ever written lies in /tmp (a small file of each engine process) and /cache
# (models by hub id; on a GPU what Triton compiles): the root file system may be read-only.
ENV PATH=/opt/vitrine/bin:/opt/venv/bin:$PATH \
    HOME=/cache \
    XDG_CACHE_HOME=/cache \
    HF_HOME=/cache/huggingface \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    VITRINE_HOST=0.0.0.0
WORKDIR /
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s \
    CMD ["python3", "/usr/local/lib/vitrine/healthcheck.py"]
ENTRYPOINT ["vitrine"]
CMD ["serve"]

# On a GPU Triton compiles small C files at its start: against libc and Python's headers.
FROM base AS cuda-base
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev python3-dev \
    && rm -rf /var/lib/apt/lists/* /var/cache/* /var/log/*
ENV CC=gcc \
    TRITON_CACHE_DIR=/cache/triton \
    CUDA_CACHE_PATH=/cache/nv \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

# Tools of the build, none of which get into an image.
FROM base AS build
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3-venv gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
RUN --mount=type=cache,target=/root/.cache/pip \
    python3 -m venv /opt/tools \
    && /opt/tools/bin/pip install "cyclonedx-bom==7.5.0" \
    && python3 -m venv --without-pip /opt/venv \
    && python3 -c 'from sysconfig import get_path as p; print(p("purelib", "venv", {"base": "/opt/venv"}))' \
       > /opt/site-packages \
    && echo /opt/vitrine > "$(cat /opt/site-packages)/vitrine.pth"

# The packages to install: a layer of their own, so that those below are built again only when the
# list changes, not with every other line of pyproject.toml.
FROM build AS requirements
COPY pyproject.toml deploy/image/requirements.py ./
RUN python3 requirements.py grammar otel gpu > /requirements.txt

FROM build AS cpu-venv
ARG TORCH_INDEX=""
COPY constraints.txt deploy/check_torch.py deploy/image/trim.sh ./
COPY --from=requirements /requirements.txt ./
RUN --mount=type=cache,target=/root/.cache/pip \
    /opt/tools/bin/python check_torch.py ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} \
    && /opt/tools/bin/pip --python /opt/venv/bin/python install --constraint constraints.txt \
       ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} --requirement requirements.txt \
    && ./trim.sh "$(cat /opt/site-packages)"

FROM build AS cuda-venv
COPY constraints.txt deploy/image/trim.sh ./
COPY --from=requirements /requirements.txt ./
RUN --mount=type=cache,target=/root/.cache/pip \
    /opt/tools/bin/pip --python /opt/venv/bin/python install --constraint constraints.txt \
       --requirement requirements.txt \
    && ./trim.sh "$(cat /opt/site-packages)"

# The product itself, a few MB above the packages. Its kernels are compiled ahead for every kind
# of processor: the CPU image has no compiler and loads no code from a folder that can be written.
FROM build AS app
COPY pyproject.toml README.md LICENSE ./
COPY model model
COPY service service
RUN --mount=type=cache,target=/root/.cache/pip \
    /opt/tools/bin/pip --python /opt/venv/bin/python install --no-deps --target /opt/vitrine .
WORKDIR /opt/vitrine
RUN python3 -m model.kernels.prebuild

# What is in each image: Python's packages and Debian's, as CycloneDX.
FROM cpu-venv AS cpu-sbom
COPY deploy/image/sbom.py ./
COPY --from=app /opt/vitrine /opt/vitrine
COPY --from=base /var/lib/dpkg/status /image/dpkg-status
RUN /opt/tools/bin/python sbom.py /opt/venv/bin/python /image/dpkg-status /image/sbom.cdx.json

FROM cuda-venv AS cuda-sbom
COPY deploy/image/sbom.py ./
COPY --from=app /opt/vitrine /opt/vitrine
COPY --from=cuda-base /var/lib/dpkg/status /image/dpkg-status
RUN /opt/tools/bin/python sbom.py /opt/venv/bin/python /image/dpkg-status /image/sbom.cdx.json

FROM cuda-base AS cuda
COPY --from=cuda-venv /opt/venv /opt/venv
COPY --from=app /opt/vitrine /opt/vitrine
COPY --from=cuda-sbom /image/sbom.cdx.json /usr/share/vitrine/sbom.cdx.json
USER 10001:10001
ARG VERSION="" REVISION=""
LABEL org.opencontainers.image.title="vitrine" \
      org.opencontainers.image.description="A text-generation server in a glass case (CUDA)" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$REVISION"

FROM base AS cpu
COPY --from=cpu-venv /opt/venv /opt/venv
COPY --from=app /opt/vitrine /opt/vitrine
COPY --from=cpu-sbom /image/sbom.cdx.json /usr/share/vitrine/sbom.cdx.json
USER 10001:10001
ARG VERSION="" REVISION=""
LABEL org.opencontainers.image.title="vitrine" \
      org.opencontainers.image.description="A text-generation server in a glass case (CPU)" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$REVISION"
