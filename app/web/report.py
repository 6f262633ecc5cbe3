"""`Report`: how a mask came about; `ProbabilityList`: what else of it can be fetched."""

from __future__ import annotations

from datetime import datetime
from urllib.parse import quote

from pydantic import BaseModel, Field

from app.jobs.record import Job, LabelName, MaskGrid, Origin
from app.web.resources import NOTICE, JobLinks, Modalities


class Software(BaseModel):
    """Versions by package."""

    worker: dict[str, str] = Field(description="Of the worker that made the mask.")
    model: dict[str, str] = Field(description="Of what trained the model, as its card has them; may be empty.")


class ReportRegion(BaseModel):
    """A union of labels that is measured as one."""

    name: str
    values: list[int] = Field(description="Of the voxels in the mask that belong to it.")
    volume_ml: float
    expected_dice: float | None = Field(
        description="What the model scored on its own test set with exactly these modalities. Null: never measured."
    )


class Report(BaseModel):
    """How a mask came about, and how far it can be relied on: all that a paper or a laboratory book needs of it."""

    job: str
    model: str
    task: str
    backbone: str
    weights_sha256: str = Field(description="Of the weights that made the mask.")
    card_sha256: str = Field(description="Of the model's card.json.")
    software: Software
    modalities: Modalities
    attempts: int
    created: datetime
    started: datetime | None
    finished: datetime | None
    seconds: dict[str, float] = Field(description="How long each stage took, in order.")
    grid: MaskGrid = Field(
        description="Of the mask. `axes`: the direction in which each axis grows, of R/L, A/P and S/I; the closest "
        "ones where the scan is oblique."
    )
    labels: list[LabelName] = Field(description="What the values in the mask stand for.")
    regions: list[ReportRegion]
    expected_on: str | None = Field(description="The data set that the expected Dice is of.")
    warnings: list[str] = Field(description="What a reader of the mask should know of it.")
    links: JobLinks
    notice: str = NOTICE

    @classmethod
    def of(cls, job: Job, origin: Origin) -> Report:
        """The resource for a record that has succeeded."""
        volumes, dice = job.volumes_ml or {}, job.expected.dice if job.expected else {}
        return cls(
            job=job.id,
            model=job.model,
            task=origin.task,
            backbone=origin.backbone,
            weights_sha256=job.weights_sha256,
            card_sha256=origin.card_sha256,
            software=Software(worker=origin.software, model=origin.trained_with),
            modalities=Modalities(given=list(job.given), missing=list(job.missing)),
            attempts=job.attempts,
            created=job.created,
            started=job.started,
            finished=job.finished,
            seconds=job.seconds,
            grid=origin.grid,
            labels=list(job.labels),
            regions=[
                ReportRegion(name=name, values=list(values), volume_ml=volumes[name], expected_dice=dice.get(name))
                for name, values in origin.regions.items()
            ],
            expected_on=job.expected.dataset if job.expected else None,
            warnings=list(job.warnings),
            links=JobLinks.of(job),
        )


class RegionLink(BaseModel):
    """Where the probabilities of a region are."""

    region: str
    href: str


class ProbabilityList(BaseModel):
    """The regions whose probabilities can be fetched."""

    regions: list[RegionLink]
    notice: str = NOTICE

    @classmethod
    def of(cls, job: Job) -> ProbabilityList:
        """The resource for a record that has some."""
        here = f"/jobs/{job.id}/probabilities"
        return cls(regions=[RegionLink(region=r, href=f"{here}/{quote(r, safe='')}") for r in job.probability_regions])
