# The HTTP service: no torch.
#   docker build -f docker/api.Dockerfile -t passion-seg-api .
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
 && pip --python /opt/passion/bin/python install -c constraints.txt ".[api,s3]" \
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
ENV PATH=/opt/passion/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PASSION_HOST=0.0.0.0 \
    PASSION_PORT=8000 \
    PASSION_STORE=/var/lib/passion
USER passion
WORKDIR /var/lib/passion
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=20s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as u; u.urlopen('http://127.0.0.1:%s/livez' % os.environ['PASSION_PORT'], timeout=4)"]
CMD ["passion-server", "api"]
