"""`save`: a job's mask and what there is beside it as files, and what they are called."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from app.client import Client, ClientError
from app.client_names import Result

_ENDINGS = {Result.REPORT: "-report.json", Result.PREVIEW: "-preview.png"}


def save(client: Client, job: dict[str, Any], mask: Path, results: list[Result]) -> list[Path]:
    """Write the mask of a job that has succeeded, and the results beside it. Returns the files, the mask first.

    Raises `ClientError`, also for a result that the service could not make: the job's warnings say why.
    """
    client.fetch(job["links"]["mask"], mask)
    stem = mask.name.removesuffix(".gz").removesuffix(".nii")
    written = [mask]
    for result in results:
        address = job["links"].get(result)
        if address is None:
            raise ClientError(f"the job has no {result}; its warnings say why: {'; '.join(job['warnings'])}")
        if result is Result.PROBABILITIES:
            files = {
                # A region's name is the model's: whatever is in it, the file stays in this folder.
                mask.with_name(f"{stem}-{region['region'].replace('/', '_')}-probability.nii.gz"): region["href"]
                for region in client.look(address)["regions"]
            }
        else:
            files = {mask.with_name(stem + _ENDINGS[result]): address}
        for path, href in files.items():
            client.fetch(href, path)
            written.append(path)
    return written
