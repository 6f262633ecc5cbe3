# The worker: one job's files in, a mask out.
#   docker build -f docker/worker.Dockerfile -t passion-seg-worker .
# On Linux the default index's torch brings CUDA along and runs without a GPU too. For a smaller image that never sees a
# GPU, name an index with CPU builds of the same version: --build-arg PIP_EXTRA_INDEX_URL=...
ARG BASE_IMAGE=python:3.11-slim

FROM ${BASE_IMAGE} AS build
# An index other than pip's own default; pip ignores empty values.
ARG PIP_INDEX_URL=""
ARG PIP_EXTRA_INDEX_URL=""
ARG PIP_DISABLE_PIP_VERSION_CHECK=1
# Without pip inside: the base image's own fills it, so the final environment has no installer.
RUN python -m venv --without-pip /opt/passion
WORKDIR /src
# The libraries in a layer of their own, which lasts until the requirements change; our code in a second, small one.
COPY pyproject.toml constraints.txt ./
RUN --mount=type=cache,target=/root/.cache/pip \
    touch README.md LICENSE NOTICE \
 && pip --python /opt/passion/bin/python install -c constraints.txt ".[worker,strip,s3]" \
 && pip --python /opt/passion/bin/python uninstall --yes passion-seg
COPY . .
RUN --mount=type=cache,target=/root/.cache/pip \
    pip --python /opt/passion/bin/python install --no-deps --prefix /opt/code .

FROM ${BASE_IMAGE}
# A fixed number, so that folders of the host can be given to it. The store is made here, because a new named volume
# takes over the owner of the folder it is mounted on.
RUN useradd --uid 10001 --user-group --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin passion \
 && install -d -o passion -g passion -m 0700 /var/lib/passion
COPY --from=build /opt/passion /opt/passion
COPY --from=build /opt/code /opt/passion
COPY docker/worker_health.py /opt/passion/bin/worker_health.py
ENV PATH=/opt/passion/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PASSION_STORE=/var/lib/passion
USER passion
WORKDIR /var/lib/passion
HEALTHCHECK --interval=10s --timeout=10s --start-period=60s --retries=3 \
    CMD ["python", "/opt/passion/bin/worker_health.py"]
CMD ["passion-server", "worker"]
