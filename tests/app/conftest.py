from service_fixtures import client, redis_url, settings, tiny  # noqa: F401 - pytest finds fixtures by name
