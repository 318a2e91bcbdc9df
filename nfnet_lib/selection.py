"""Which weights of a run to keep: the best on training examples that were kept out of training, never on held-out ones."""

from typing import Any

from jaxtyping import PyTree

from nfnet_lib import distributed
from nfnet_lib.sources import Subset


class Selection:
    """The best weights so far, by top-1 on `source`, then by loss there; nothing at all where source is None.

    params: a copy on the host, at first of the weights given. record: their step and kind, and how they did; JSON.
    """

    def __init__(self, source: Subset | None, params: PyTree):
        self.source = source
        self.params = None if source is None else distributed.host_copy(params)
        self.record: dict[str, Any] | None = None

    def resume(self, params: PyTree, record: dict[str, Any] | None) -> None:
        """Go on from what a checkpoint holds."""
        self.params, self.record = params, record

    def consider(self, params: PyTree, results: dict[str, float], step: int, weights: str) -> None:
        """Keep a copy of `params` if they did better than all before; of equals the first stays."""
        if self.source is None:
            return
        top1, loss = results["selection_top1"], results["selection_loss"]
        if self.record is None or (-top1, loss) < (-self.record["top1"], self.record["loss"]):
            self.params = distributed.host_copy(params)
            self.record = {"step": step, "weights": weights, "top1": top1, "loss": loss}
