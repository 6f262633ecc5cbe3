"""A real S3 server on a free port of this machine (moto's), with one bucket."""

import os
from contextlib import contextmanager

BUCKET = "scans"
ACCOUNT = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "secret-of-the-store",
    "AWS_DEFAULT_REGION": "us-east-1",
}


def start(port=0):
    """A server; one that is started again on the same port has what the one before had."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", port=port, verbose=False)
    server.start()
    return server


@contextmanager
def s3_server():
    """The server; the environment of this process, and of what it starts, names it."""
    server = start()
    host, port = server.get_host_and_port()
    before = dict(os.environ)
    os.environ |= ACCOUNT | {"AWS_ENDPOINT_URL": f"http://{host}:{port}"}
    try:
        from boto3 import client

        client("s3").create_bucket(Bucket=BUCKET)
        yield server
    finally:
        server.stop()
        os.environ.clear()
        os.environ.update(before)
