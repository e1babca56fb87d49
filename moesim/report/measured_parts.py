"""Parts of documents about predictions against executions."""

from __future__ import annotations

from pydantic import Field, JsonValue

from moesim.report.parts import Part


class Errors(Part):
    """Relative errors of predictions; ape = |predicted/measured - 1|, bias = mean(predicted/measured - 1), all shares."""

    n: int
    median_ape: float
    p90_ape: float
    mape: float
    bias: float
    p99_ape: float | None = None
    worst: float | None = None
    interval: tuple[float, float] | None = None  # 95 %, of the median


class Calibration(Errors):
    """What the kernel was fitted on, and how well it fits that."""

    kernel: dict[str, JsonValue] = {}
    measured_on: str | None = None


class Case(Part):
    """One layer of one rank, predicted and executed. `cv` is the coefficient of variation of the repeats."""

    plan: str
    layer: int
    rank: int
    tokens: float
    experts: float | None = None
    predicted_s: float = Field(gt=0)
    measured_s: float = Field(gt=0)
    cv: float | None = None
    batch: int | None = None
    gather_s: float | None = None  # local copies of tokens before dispatch and after combine
    combine_s: float | None = None


class Batch(Part):
    """An executed batch; `network_s` are the exchanges of each plan, layer by layer, which were modelled, or null."""

    batch: int
    network_s: dict[str, list[float] | None] = {}


class RankedPlan(Part):
    """A plan's time, predicted and measured: its slowest rank's, summed over layers."""

    name: str
    predicted_s: float = Field(gt=0)
    measured_s: float = Field(gt=0)


class Ranking(Part):
    """Whether predictions order plans as measurements do. `top1_regret` = measured time of the predicted best over the best, minus 1.

    `batch` is the number of tokens, where several were executed.
    """

    plans: list[RankedPlan] = Field(min_length=1)
    spearman: float | None = None
    kendall: float | None = None
    top1_regret: float | None = None
    spread: float | None = None
    noise_floor: float | None = None
    verdict: str = ""
    batch: int | None = None


class RankOrder(Part):
    """Rank correlation over single ranks' times."""

    spearman: float | None = None
    kendall: float | None = None
    reliability: float | None = None
    verdict: str = ""


class Execution(Part):
    """A plan carried out: a cache, a migration, one process per rank, a model. Times where one was measured or predicted."""

    kind: str
    name: str
    detail: str
    measured_s: float | None = None
    predicted_s: float | None = None
    notes: list[str] = []


class Check(Part):
    """Something that had to hold."""

    name: str
    ok: bool
    detail: str = ""


class Validation(Part):
    """Predictions against executions on real hardware; `ranking_tokens_only` ranks by token counts alone."""

    device: str
    backend: str
    hardware: dict[str, JsonValue] = {}
    date: str | None = None
    calibration: Calibration | None = None
    cases: list[Case] = Field(min_length=1)
    summary: Errors
    models: dict[str, Errors] = {}
    ranking: Ranking | None = None
    ranking_tokens_only: Ranking | None = None
    timing: str | None = None
    repeats: int | None = None
    checks: list[Check] = []
    modelled: list[str] = []
    dtype: str | None = None
    layer_summary: Errors | None = None
    by_layer: dict[str, Errors] = {}
    by_batch: dict[str, Errors] = {}
    rankings: list[Ranking] = []
    batches: list[Batch] = []
    per_rank: RankOrder | None = None
    executions: list[Execution] = []
    target: dict[str, float] = {}
    notes: list[str] = []

    @property
    def where(self) -> str:
        """The device by the name of its hardware, where the document has it."""
        name = self.hardware.get("gpu") or (self.hardware.get("cpu") if self.device == "cpu" else None)
        return f"{self.device} ({name})" if name else self.device
