"""What a plan may cost: a share of the MACs or parameters, a latency, or a speed-up."""

from dataclasses import dataclass
from typing import Literal, cast, get_args

from norton_deploy.errors import UserError

Kind = Literal["macs", "params", "latency_ms", "speedup"]


@dataclass(frozen=True)
class Budget:
    """A limit of one kind.

    Attributes:
        kind: macs or params (a share of the dense model's, 0..1), latency_ms, or speedup over the dense model.
        amount: the limit.
    """

    kind: Kind
    amount: float

    @classmethod
    def parse(cls, text: str) -> "Budget":
        """ "speedup=4" -> Budget("speedup", 4.0).

        Raises:
            UserError: not one of the four kinds, or an impossible number.
        """
        kind, _, number = text.partition("=")
        try:
            amount = float(number)
        except ValueError:
            amount = -1.0
        if kind not in get_args(Kind) or amount <= 0:
            raise UserError(f"--budget {text}: expected macs=0.2, params=0.5, latency_ms=400 or speedup=4")
        if kind in ("macs", "params") and amount > 1:
            raise UserError(f"--budget {text}: a share of the dense model's, between 0 and 1")
        return cls(cast(Kind, kind), amount)

    @property
    def is_latency(self) -> bool:
        """Whether keeping it needs measured times."""
        return self.kind in ("latency_ms", "speedup")

    def __str__(self) -> str:
        return f"{self.kind}={self.amount:g}"
