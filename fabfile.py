from swarmmail.tasks import ns  # noqa: F401
