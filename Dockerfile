# One file, two images:
#   docker build -t vitrine:cuda .                               for a GPU node
#   docker build -t vitrine --build-arg TORCH_INDEX=URL .        for a CPU
#
# URL is the package index that serves torch's CPU builds (pytorch.org names it under "Get
# started"); without it pip takes the default build, which on Linux brings CUDA.

FROM python:3.12-slim AS build
ARG TORCH_INDEX=""
WORKDIR /src
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
# Dependencies first: this layer is rebuilt only when they change.
COPY pyproject.toml constraints.txt README.md LICENSE ./
RUN mkdir model service && touch model/__init__.py service/__init__.py \
    && pip install --no-cache-dir --constraint constraints.txt \
       ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} '.[grammar]' \
    && pip uninstall --yes vitrine
COPY model model
COPY service service
RUN pip install --no-cache-dir --no-deps .

FROM python:3.12-slim
LABEL org.opencontainers.image.title="vitrine" \
      org.opencontainers.image.description="A text-generation server in a glass case" \
      org.opencontainers.image.licenses="Apache-2.0"
# The CPU kernels are compiled for the processor they run on, at the first start.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --create-home vitrine
COPY --from=build /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    VITRINE_HOST=0.0.0.0
USER 10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health/ready', timeout=2)"]
ENTRYPOINT ["vitrine"]
CMD ["serve"]
