"""A Redis behind TLS, `rediss://`: records and messages go there, and nowhere whose certificate is not trusted."""

import datetime
import ipaddress
import socket
import ssl
import threading
from contextlib import contextmanager, suppress
from urllib.parse import urlsplit

import pytest
import redis
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from app.jobs.connection import connect
from app.jobs.queue import JobQueue, QueueError
from app.jobs.record import InputFile, Job, new_id
from app.jobs.store import JobStore


def certificate(folder):
    """A certificate of this machine's that signs itself, and its key, in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem, private = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    path = folder / "tls.pem"
    path.write_bytes(made.public_bytes(pem) + key.private_bytes(pem, private, serialization.NoEncryption()))
    return path


def copy(source, target):
    try:
        while data := source.recv(65536):
            target.sendall(data)
    except OSError:
        pass
    finally:
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@contextmanager
def behind_tls(port, pem):
    """The port of a door that speaks TLS and hands everything on to `port`."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    listener = socket.create_server(("127.0.0.1", 0))

    def serve():
        while True:
            try:
                plain, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=hand_on, args=(plain,), daemon=True).start()

    def hand_on(plain):
        try:
            outer = context.wrap_socket(plain, server_side=True)
        except OSError:  # somebody who does not trust us
            plain.close()
            return
        inner = socket.create_connection(("127.0.0.1", port))
        threading.Thread(target=copy, args=(inner, outer), daemon=True).start()
        copy(outer, inner)

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.close()


def test_records_and_messages_go_through_tls(settings, tmp_path):
    pem = certificate(tmp_path)
    plain = urlsplit(settings.redis_url)
    with behind_tls(plain.port, pem) as port:
        url = f"rediss://:{plain.password}@127.0.0.1:{port}/0?ssl_ca_certs={pem}"
        safe = settings.model_copy(update={"redis_url": url})
        client, queue = connect(safe), JobQueue(safe)
        job = Job(id=new_id(), model="m", inputs=(InputFile(modality="t2", filename="t2.nii.gz"),))
        JobStore(client, safe).create(job)
        queue.submit(job)
        assert queue.message_ids(client, [job]) == {job.id}
        queue.close()
        client.close()
    with behind_tls(plain.port, pem) as port:  # another door, as Celery keeps its connections by host and port
        stranger = settings.model_copy(update={"redis_url": f"rediss://:{plain.password}@127.0.0.1:{port}/0"})
        client, queue = connect(stranger), JobQueue(stranger)
        with pytest.raises(redis.RedisError):
            client.ping()
        with pytest.raises(QueueError):
            queue.submit(job)
        queue.close()
        client.close()
