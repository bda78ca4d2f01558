# syntax=docker/dockerfile:1
# Images that run models: the target `serve` (the default) and the target `detect`; docs/containers.md.
#   docker build -t anchorline .
#   docker build -t anchorline:gpu --build-arg EXTRAS=gpu,serve,video .
# One base for both: the wheels of the extra `gpu` bring CUDA, cuDNN and TensorRT; the driver comes from the host.
ARG PYTHON=3.12

FROM python:${PYTHON}-slim AS build
ARG EXTRAS=cpu,serve,video
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY anchorline anchorline
RUN python -m venv --without-pip /opt/anchorline \
    && python -m pip --python /opt/anchorline/bin/python install \
        --no-cache-dir --no-input --disable-pip-version-check -c constraints.txt ".[${EXTRAS}]"

FROM python:${PYTHON}-slim AS runtime
# Nobody's account: no home, no shell. It writes into the cache and into what is mounted for it, nothing else.
RUN useradd --uid 10001 --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin anchorline \
    && install --directory --owner=anchorline --group=anchorline /cache /data
COPY --from=build /opt/anchorline /opt/anchorline
ENV PATH=/opt/anchorline/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    XDG_CACHE_HOME=/cache \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility,video
USER 10001:10001
WORKDIR /data

# docker run -v ./clips:/data anchorline:detect clip.mp4 --model model.onnx --save out.mp4
FROM runtime AS detect
ENTRYPOINT ["anchorline", "detect"]
CMD ["--help"]

# docker run -p 8000:8000 -v ./models:/data:ro anchorline model.onnx
FROM runtime AS serve
EXPOSE 8000
# Past any proxy of the environment, which would be asked for 127.0.0.1 too.
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s --retries=3 CMD ["python", "-c", "from urllib.request import ProxyHandler, build_opener; build_opener(ProxyHandler({})).open('http://127.0.0.1:8000/v2/health/ready', timeout=4)"]
ENTRYPOINT ["anchorline", "serve", "--host", "0.0.0.0", "--port", "8000"]
CMD ["model.onnx"]
