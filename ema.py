"""Momentum CLIP-V: a moving average of the visual encoder, the teacher of SPD and CPA."""
import copy

import torch


def frozen_copy(module):
    """A copy of `module` as it is now, in eval mode, without gradients. It shares the parameters
    that do not require gradients, so choose what trains before calling this."""
    shared = {id(p): p for p in module.parameters() if not p.requires_grad}
    return copy.deepcopy(module, shared).eval().requires_grad_(False)  # as memo: shared, not copied


class MomentumEncoder:
    """E^M of the paper: E^M = alpha * E^M + (1 - alpha) * E, starting as a copy of E.

    encoder: E, any nn.Module, on its final device. E^M shares the parameters that do not require
    gradients, so choose what trains before. alpha: the momentum, in [0, 1]; 1 gives a frozen
    teacher. Calling it runs E^M without a graph and returns what E returns. It is no nn.Module, so
    that neither the optimiser nor DDP sees its parameters."""

    def __init__(self, encoder, alpha):
        if not 0 <= alpha <= 1:
            raise ValueError(f"the momentum alpha must lie in [0, 1], not {alpha}")
        self.alpha = alpha
        self.target = encoder
        self.average = frozen_copy(encoder)
        pairs = zip(self.average.parameters(), encoder.parameters())
        self.pairs = [(average, target) for average, target in pairs if average is not target]

    @torch.no_grad()
    def __call__(self, *inputs):
        return self.average(*inputs)

    @torch.no_grad()
    def update(self):
        """E^M = alpha E^M + (1 - alpha) E, once after each optimiser step; buffers are copied."""
        if self.pairs:
            averages, targets = zip(*self.pairs)
            torch._foreach_lerp_(averages, targets, 1 - self.alpha)
        for average, target in zip(self.average.buffers(), self.target.buffers()):
            average.copy_(target)

    def state_dict(self):
        """{name: tensor} of what E^M does not share with E."""
        shared = {p.data_ptr() for p in self.target.parameters()}
        state = self.average.state_dict()
        return {name: t for name, t in state.items() if t.data_ptr() not in shared}

    def load_state_dict(self, state):
        """Take back what `state_dict` gave. Raises ValueError when it is another encoder's."""
        if state.keys() != self.state_dict().keys():
            raise ValueError("the momentum state belongs to another encoder")
        self.average.load_state_dict({**self.average.state_dict(), **state})
