"""How the layers take a state dict."""

from __future__ import annotations

import torch
from torch import nn


class WholeState(nn.Module):
    """A module that takes tensors that fit, or none: where nn.Module copies those that fit before it raises because of
    another, this keeps all the values that it had."""

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors) -> None:
        before = {name: (p, p.detach().clone()) for name, p in self._parameters.items() if p is not None}
        count = len(errors)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)
        if len(errors) > count:
            with torch.no_grad():
                for name, (parameter, values) in before.items():
                    self._parameters[name] = parameter.copy_(values)
