"""A draft with a smaller head: only the tokens that are most frequent in the target's answers can be proposed.

The head is a large part of a small draft's cost. A cut one is cheaper and proposes less; both are measured.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from specflow.data.vocab import count_supervised
from specflow.drafters.eagle3 import Eagle3Draft
from specflow.files import read_jsonl


def by_frequency(draft: Eagle3Draft, samples: Path, always: Iterable[int]) -> Tensor:
    """Draft tokens [D] int64, most frequent first: `always` (target ids), then by falling count in the training
    answers, ties to the lower id. `samples` is the file that the draft vocabulary was chosen on.
    """
    rows = read_jsonl(samples, what="samples", made_by="specflow sample <family>")
    counts: NDArray[np.int64] = sum(
        count_supervised(rows, draft.config.vocab_size).values(), np.zeros(draft.config.vocab_size, dtype=np.int64)
    )
    target_ids = (draft.d2t.cpu() + torch.arange(draft.config.draft_vocab_size)).numpy()
    forced = np.isin(target_ids, np.fromiter(always, dtype=np.int64))
    return torch.from_numpy(np.lexsort((target_ids, -counts[target_ids], ~forced)))


def cut_draft(draft: Eagle3Draft, kept: Tensor) -> Eagle3Draft:
    """A copy of the draft with only the tokens `kept` (draft ids) in its head."""
    kept = kept.sort().values
    target_ids = (draft.d2t.cpu() + torch.arange(draft.config.draft_vocab_size))[kept]
    smaller = Eagle3Draft(draft.config.model_copy(update={"draft_vocab_size": len(kept)}))
    t2d = torch.zeros(draft.config.vocab_size, dtype=torch.bool)
    t2d[target_ids] = True
    state = draft.state_dict()
    state |= {
        "lm_head.weight": state["lm_head.weight"].cpu()[kept],
        "d2t": target_ids - torch.arange(len(kept)),
        "t2d": t2d,
    }
    smaller.load_state_dict(state)
    return smaller.eval()
