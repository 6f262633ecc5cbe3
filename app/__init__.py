"""The HTTP service and its command. Knows files, jobs and people; never imports torch."""
