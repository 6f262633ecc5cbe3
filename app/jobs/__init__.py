"""The life of a job: its record, states, files on the store, and the queue. No HTTP, no torch."""
