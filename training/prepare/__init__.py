"""From a folder of scans to a prepared data set: find, check, bring to one grid, crop."""

from training.prepare.dataset import CaseOutcome, Report, prepare_dataset
from training.prepare.discover import RawCase, find_cases

__all__ = ["CaseOutcome", "RawCase", "Report", "find_cases", "prepare_dataset"]
