# Offline work: phantoms, preparing, training, evaluating. Runs one command of `passion` and ends.
#   docker build -f docker/training.Dockerfile -t passion-seg-training .
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
 && pip --python /opt/passion/bin/python install -c constraints.txt ".[training,phantom]" \
 && pip --python /opt/passion/bin/python uninstall --yes passion-seg
COPY . .
RUN --mount=type=cache,target=/root/.cache/pip \
    pip --python /opt/passion/bin/python install --no-deps --prefix /opt/code .

FROM ${BASE_IMAGE}
# A fixed number, so that the folders mounted for data and runs can be given to it.
RUN useradd --uid 10001 --user-group --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin passion \
 && install -d -o passion -g passion -m 0755 /work /work/data /work/runs
COPY --from=build /opt/passion /opt/passion
COPY --from=build /opt/code /opt/passion
# matplotlib keeps a cache of fonts, and the root file system may be read-only.
ENV PATH=/opt/passion/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    MPLCONFIGDIR=/tmp/matplotlib
USER passion
WORKDIR /work
# It serves nothing, so there is no health to check.
HEALTHCHECK NONE
ENTRYPOINT ["passion"]
CMD ["--help"]
