"""Synthetic patients on real anatomy: BraTS-style folders for demonstrations, tests and smoke training."""

from training.phantom.subject import PhantomSubject, make_subject, subject_id, write_subject

__all__ = ["PhantomSubject", "make_subject", "subject_id", "write_subject"]
