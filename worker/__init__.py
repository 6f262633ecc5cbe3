"""The Celery application and its one task: a job's files in, a mask out."""
