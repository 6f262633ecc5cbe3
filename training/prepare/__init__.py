"""From a folder of scans to a prepared data set: find, check, bring to one grid, crop."""

from training.prepare.dataset import CaseOutcome, Report, prepare_dataset
from training.prepare.discover import find_cases
from training.prepare.nnunet import is_nnunet
from training.prepare.raw_case import RawCase

__all__ = ["CaseOutcome", "RawCase", "Report", "find_cases", "is_nnunet", "prepare_dataset"]
