"""Training throughput, as ratios measured side by side in one process: `python benchmarks/training.py [--family
smollm2]`.

1. Share of this machine's fp32 GEMM peak that a training step reaches, counting useful FLOPs only.
2. A batch of 2 x 256 random tokens, all supervised, at TTT 3 and 7, beside the peers' figures for the same batch
and draft (measured where torch's fp32 GEMM peak was 184 GFLOP/s; scaled here by today's peak of the same product).
3. With --family: the family's own documents packed, against the same documents right-padded to the longest.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from specflow import kernels
from specflow.config import Train, load_params
from specflow.drafters.eagle3 import Eagle3Config, Eagle3Draft
from specflow.hidden_states import HiddenStateStore
from specflow.stage import family_paths
from specflow.training.checkpoint import Checkpoints
from specflow.training.features import StoredFeatures
from specflow.training.loop import Trainer
from specflow.training.packing import ROUND_ROWS, Batch, Document, pack, plan_batches

PEERS_TOK_S = {3: ("speculators, trained head", 636.0), 7: ("plain prototype", 308.0)}
PEERS_PEAK_GFLOPS = 184.0
ROUNDS = 7
"""Of peak and steps in turn; medians of their ratios are printed, since the clock of a shared machine drifts by 5 %
within a run.
"""
H, D, V, INTERMEDIATE = 576, 8192, 49152, 1536
CONFIG = Eagle3Config(
    hidden_size=H,
    target_hidden_size=H,
    intermediate_size=INTERMEDIATE,
    num_attention_heads=9,
    num_key_value_heads=3,
    head_dim=64,
    rms_norm_eps=1e-5,
    max_position_embeddings=8192,
    rope_parameters={"rope_type": "default", "rope_theta": 1e5},
    vocab_size=V,
    draft_vocab_size=D,
    aux_layer_ids=[2, 15, 27],
)


class NoFeatures:
    def __init__(self, documents: list[Document]) -> None:
        self.documents_ = documents

    def rows(self, split: str) -> list[Row]:
        return [Row(d) for d in self.documents_]

    def documents(self, rows: list[Row]) -> list[Document]:
        return [row.document for row in rows]


class Row:
    def __init__(self, document: Document) -> None:
        self.id, self.length, self.spans, self.document = document.id, len(document.token_ids), document.spans, document


def best_of(runs: int, work: Callable[[], object]) -> float:
    work()
    times = []
    for _ in range(runs):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)


def gemm_peaks() -> tuple[float, float]:
    """GFLOP/s of a 2048-cubed fp32 product: torch's own, and through kernels.matmul."""
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    work = 2 * 2048**3 / 1e9
    return work / best_of(8, lambda: a @ b), work / best_of(8, lambda: kernels.matmul(a, b))


def make_trainer(documents: list[Document], ttt_steps: int) -> Trainer:
    torch.manual_seed(0)
    draft = Eagle3Draft(CONFIG)
    chosen = torch.randperm(V)[:D].sort().values
    draft.d2t.copy_(chosen - torch.arange(D))
    draft.t2d[chosen] = True
    table = torch.randn(V, H) * 0.05
    return Trainer(
        stage="benchmark",
        draft=draft,
        embedding=table,
        full_head=table,
        features=NoFeatures(documents),
        config=Train(ttt_steps=ttt_steps, epochs=1),
        checkpoints=Checkpoints(Path("/nonexistent")),
        log=lambda values, step: None,
        device=torch.device("cpu"),
    )


def useful_flops(c: Eagle3Config, batch: Batch) -> float:
    """Products that the definition needs, forward and backward (3 x), and the teacher's (1 x). Of attention the keys
    that a row sees, 1.5 % of all where documents have 256 tokens; no norms, nothing that is computed twice.

    No gradient is needed in the captured states.
    """
    n, m = len(batch.rows.positions), len(batch.rows.queries)
    h, q, kv = c.hidden_size, c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    layer = 2 * h * q + q * h + 3 * h * c.intermediate_size
    total = 2 * n * len(c.aux_layer_ids) * c.target_hidden_size * h + 3 * n * 2 * (2 * h * kv)
    seen = sum((s.stop - s.start) * (s.start + s.stop + 1 - 2 * s.document) / 2 for s in batch.rows.prefix.segments)
    for k, rows in enumerate(batch.supervised):
        total += 3 * 2 * q * (seen + m * k)
        total += 3 * (m * layer + (m * 2 * (2 * h * kv) if k else 0) + len(rows) * h * c.draft_vocab_size)
    return 2.0 * (total + len(batch.teacher_states) * c.target_hidden_size * c.draft_vocab_size)


def random_document(length: int, spans: list[tuple[int, int]]) -> Document:
    return Document("x", torch.randint(V, (length,)), torch.randn(length, 3 * H), torch.randn(length, H), spans)


def time_steps(trainer: Trainer, batches: list[Batch], runs: int) -> float:
    """Seconds of one optimizer step per batch, all of them."""
    return best_of(runs, lambda: [trainer.step([batch], 0) for batch in batches])


def spread(shares: list[float]) -> str:
    return f"{statistics.median(shares):.1%} [{min(shares):.1%}, {max(shares):.1%}]"


def peers(runs: int) -> None:
    for ttt_steps, (peer, peer_tok_s) in PEERS_TOK_S.items():
        documents = [random_document(256, [(0, 256)]) for _ in range(2)]
        trainer, batch = make_trainer(documents, ttt_steps), pack(documents, ttt_steps)
        ratios, shares = [], []
        for _ in range(ROUNDS):
            plain, onednn = gemm_peaks()
            seconds = time_steps(trainer, [batch], runs)
            ratios.append(512 / seconds / (peer_tok_s * plain / PEERS_PEAK_GFLOPS))
            shares.append(useful_flops(CONFIG, batch) / seconds / 1e9 / onednn)
        print(
            f"2 x 256 tokens, all supervised, TTT {ttt_steps}: {512 / seconds:.0f} tok/s = "
            f"{statistics.median(ratios):.2f} x "
            f"{peer} scaled to torch's peak of {plain:.0f} GFLOP/s; {spread(shares)} of the oneDNN peak "
            f"({onednn:.0f}), {statistics.median(shares) * onednn / plain:.0%} of torch's"
        )


def packed_against_padded(family: str, runs: int) -> None:
    params = load_params(Path("params.yaml"))
    settings = params.family(family).train
    features = StoredFeatures(HiddenStateStore.open(family_paths(family, params).manifest))
    rows = features.rows("train")
    plan = plan_batches([row.length for row in rows], settings.batch_tokens, seed=settings.seed, epoch=0)
    groups = [[as_float(d) for d in features.documents([rows[i] for i in members])] for members in plan[:6]]
    trainer = make_trainer([d for group in groups for d in group], settings.ttt_steps)
    packed = [pack(group, settings.ttt_steps) for group in groups]
    padded = [
        pack([pad(d, max(len(x.token_ids) for x in group)) for d in group], settings.ttt_steps) for group in groups
    ]
    whole = [
        pack([every_row(d, max(len(x.token_ids) for x in group)) for d in group], settings.ttt_steps)
        for group in groups
    ]
    flops, shares = sum(useful_flops(CONFIG, batch) for batch in packed), []
    for _ in range(ROUNDS):
        plain, onednn = gemm_peaks()
        base = time_steps(trainer, packed, runs)
        shares.append(flops / base / 1e9 / onednn)
    tokens = sum(len(d.token_ids) for group in groups for d in group)
    print(
        f"{family}, {len(groups)} packed batches: {tokens / base:.0f} tok/s, {flops / base / 1e9:.0f} GFLOP/s useful = "
        f"{spread(shares)} of the oneDNN peak ({onednn:.0f}), "
        f"{flops / base / 1e9 / plain:.0%} of torch's ({plain:.0f})"
    )
    once(trainer, features, [[rows[i] for i in members] for members in plan[6:46]], settings.ttt_steps)
    print(
        f"  the same rows right-padded, pads unsupervised: packed is {time_steps(trainer, padded, runs) / base:.2f} x"
    )
    print(f"  right-padded, every row computed as a rectangle does: {time_steps(trainer, whole, runs) / base:.2f} x")


def once(trainer: Trainer, features: StoredFeatures, groups: list[list[Row]], ttt_steps: int) -> None:
    """Batches that were not seen before, loaded and trained on one after the other, as a run does: a product of a new
    shape costs oneDNN about a millisecond more than one that it knows.
    """
    onednn, seconds, flops, tokens = [], 0.0, 0.0, 0
    for number, group in enumerate(groups):
        if number % 8 == 0:
            onednn.append(gemm_peaks()[1])
        started = time.perf_counter()
        documents = [as_float(d) for d in features.documents(group)]
        trainer.step([pack(documents, ttt_steps, ROUND_ROWS)], 0)
        seconds += time.perf_counter() - started
        plain = pack(documents, ttt_steps)  # filler is not useful
        flops, tokens = flops + useful_flops(CONFIG, plain), tokens + plain.num_tokens
    share = flops / seconds / 1e9 / statistics.median(onednn)
    print(f"  {len(groups)} batches, each once, loading included: {tokens / seconds:.0f} tok/s, {share:.1%}")


def as_float(d: Document) -> Document:
    return Document(d.id, d.token_ids, d.aux.float(), d.final.float(), d.spans)


def pad(d: Document, length: int) -> Document:
    def fill(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, x[-1:].expand(length - len(x), *x.shape[1:])])

    return Document(d.id, fill(d.token_ids), fill(d.aux), fill(d.final), d.spans)


def every_row(d: Document, length: int) -> Document:
    padded = pad(d, length)
    return Document(d.id, padded.token_ids, padded.aux, padded.final, [(0, length)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", help="also compare packed with padded batches of this family's hidden states")
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    peers(arguments.runs)
    if arguments.family:
        packed_against_padded(arguments.family, max(2, arguments.runs // 2))


if __name__ == "__main__":
    main()
