"""Disk, memory and time of every stage as formulas of the family, the target's shape and a device's assumed speed.

Arithmetic alone; what it starts from is `facts.py`'s, what is printed `command.py`'s. Time of a forward = FLOPs /
(peak * mfu), and for decoding also bytes / (bandwidth * mbu) and a fixed time per layer, added up: nothing is assumed
to overlap. N conversations of `prompt` and `answer` tokens each; B rows side by side; H hidden.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from specflow.config import Family
from specflow.device import CPU, GPU
from specflow.hidden_states import bytes_per_token
from specflow.plan.facts import Device, Shape

ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
HOST_BYTES_PER_TOKEN = 36
"""A token id in a Python list: 8 bytes of reference, 28 of integer."""
SAMPLE_BYTES_PER_TOKEN = 9.3
"""Of samples/*.jsonl: ids, spans and the answer's text (the demo's 188,505 tokens take 1.75 MB)."""
PROCESS_BYTES = 1.5e9
"""Interpreter, torch and libraries of one stage process."""
ADAM_BYTES = 16
"""Per trained parameter: weight, gradient and two moments in fp32."""
PREFILL_BATCH_TOKENS = 4096
"""Of one prefill forward, as in sample/generation.py."""
WEIGHT_SHARE = 0.7
"""Of a device's memory that weights may take where the number of devices is not given."""
FILL_SHARE = 0.92
"""Of a device's memory that a stage may fill."""
PENDING_BATCHES = 5
"""Captured batches that wait on the device for the writer: four queued, one in hand."""


@dataclass(frozen=True)
class Assumptions:
    """What a plan takes for granted; all of it is printed."""

    device: Device
    num_conversations: int
    """Both splits."""
    num_train: int
    prompt_tokens: float
    """Mean per conversation, template and all turns' questions."""
    answer_tokens: float
    """Mean per conversation, all turns' answers."""
    gpus: int = 1
    """Devices of one replica of the target."""
    shards: int = 1
    """Replicas that sample and capture side by side."""
    network_bytes_s: float = 125e6
    disk_bytes_s: float = 1e9
    """Written and digested, or read, by one process."""
    lengths_from: str = "assumed"

    @property
    def row_tokens(self) -> float:
        return self.prompt_tokens + self.answer_tokens

    @property
    def tokens(self) -> float:
        """Of all samples."""
        return self.num_conversations * self.row_tokens


@dataclass(frozen=True)
class Estimate:
    """Of one stage. `host_bytes` per process, `device_bytes` per device; `device_s` summed over all devices."""

    stage: str
    disk_bytes: float = 0.0
    host_bytes: float = PROCESS_BYTES
    device_bytes: float = 0.0
    device_s: float = 0.0
    wall_s: float = 0.0


def estimate(family: Family, shape: Shape, a: Assumptions, *, online: bool = False) -> list[Estimate]:
    """Every stage of a family that takes time or disk, in pipeline order."""
    trained = [train(family, shape, a, online=True)] if online else [extract(family, shape, a), train(family, shape, a)]
    return [fetch(family, shape, a), sample(family, shape, a), *trained, bench(family, shape, a)]


def weight_bytes(family: Family, shape: Shape) -> float:
    return float(shape.num_parameters * ITEMSIZE[family.target.dtype])


def least_gpus(family: Family, shape: Shape, device: Device) -> int:
    """Devices of one replica: the fewest, as a power of two, on which weights take at most WEIGHT_SHARE of memory."""
    if device.is_cpu:
        return 1
    return int(2 ** max(0, math.ceil(math.log2(weight_bytes(family, shape) / (WEIGHT_SHARE * device.memory_bytes)))))


def largest_batch(family: Family, shape: Shape, a: Assumptions) -> int:
    """Rows of sampling whose caches fit beside the weights at their longest (0: not even one)."""
    fixed = sampling_bytes(family, shape, rows=0)
    row = sampling_bytes(family, shape, rows=1) - fixed
    return max(0, int((a.gpus * a.device.memory_bytes * FILL_SHARE - fixed) // row))


def forward_s(shape: Shape, a: Assumptions, num_tokens: float, context: float, *, head: bool = False) -> float:
    """Device-seconds of a forward of many tokens, each attending `context` before it on average."""
    weights = shape.decoder_parameters + (shape.table_parameters if head else 0)
    return num_tokens * (2.0 * weights + shape.attention_flops(context)) / (a.device.flops * a.device.mfu)


def decode_step_s(family: Family, shape: Shape, a: Assumptions, rows: int, context: float) -> float:
    """Seconds of one decoding step of `rows` rows of `context` tokens on one replica: weights and caches read once,
    products, launches. Tensor-parallel devices share the reading and the products; their communication is left out.
    """
    size, device = ITEMSIZE[family.target.dtype], a.device
    read = shape.read_parameters(rows) * size + rows * context * shape.key_value_bytes(size)
    flops = rows * (2.0 * (shape.decoder_parameters + shape.table_parameters) + shape.attention_flops(context))
    work = read / (device.bandwidth * device.mbu) + flops / (device.flops * device.mfu)
    return work / a.gpus + shape.num_hidden_layers * device.layer_s


def fetch(family: Family, shape: Shape, a: Assumptions) -> Estimate:
    """Download of the weights in the family's dtype; a GGUF source is smaller and is written out once more."""
    size = weight_bytes(family, shape)
    return Estimate("fetch", disk_bytes=size, wall_s=size / a.network_bytes_s)


def sampling_bytes(family: Family, shape: Shape, rows: int) -> float:
    """Device memory of sampling, over a whole replica: weights, `rows` cached rows at their longest, one prefill's
    activations and the logits of a step (twice, as fp32).
    """
    size = ITEMSIZE[family.target.dtype]
    longest = min(
        family.extract.max_length_tokens,
        family.data.max_prompt_tokens + family.data.max_turns * family.sample.max_new_tokens,
    )
    row = longest * shape.key_value_bytes(size) + shape.vocab_size * 4 * 2
    return weight_bytes(family, shape) + rows * row + _activation_bytes(shape, PREFILL_BATCH_TOKENS, size)


def sample(family: Family, shape: Shape, a: Assumptions) -> Estimate:
    """Prefill of every prompt token once, then N * answer / B decoding steps with all B rows busy.

    The tail, in which fewer rows are left, is not counted. States that are kept for `extract` lie in target.dtype.
    """
    disk, host = a.tokens * SAMPLE_BYTES_PER_TOKEN, a.tokens * HOST_BYTES_PER_TOKEN + PROCESS_BYTES
    if family.sample.engine == "dataset":
        return Estimate("sample", disk, host, wall_s=a.tokens / 50e3)
    rows = min(family.sample.batch_size, a.num_conversations)
    prefill = forward_s(shape, a, a.num_conversations * a.prompt_tokens, a.prompt_tokens / 2)
    steps = a.num_conversations * a.answer_tokens / rows
    step_s = decode_step_s(family, shape, a, rows, a.prompt_tokens + a.answer_tokens / 2)
    device_s = prefill + steps * step_s * a.gpus
    device_bytes = sampling_bytes(family, shape, rows) / a.gpus
    if family.sample.keep_states:
        disk += captured_tokens(family, a) * bytes_per_token(shape.hidden_size, num_aux(family), family.target.dtype)
    return Estimate("sample", disk, host, device_bytes, device_s, device_s / (a.gpus * a.shards))


def store_bytes(family: Family, shape: Shape, tokens: float) -> float:
    """Disk of the hidden-state store, by the function that `extract` itself uses."""
    return tokens * bytes_per_token(shape.hidden_size, num_aux(family), family.extract.dtype)


def num_aux(family: Family) -> int:
    return 3 if family.extract.aux_layer_ids is None else len(family.extract.aux_layer_ids)


def captured_tokens(family: Family, a: Assumptions) -> float:
    return a.num_conversations * min(a.row_tokens, family.extract.max_length_tokens)


def extract(family: Family, shape: Shape, a: Assumptions) -> Estimate:
    """One forward of every token without the head, the states written and digested behind it (the slower of both
    counts). Memory: weights, a batch's activations and the captured batches that wait for the writer; on the host one
    shard and all samples.
    """
    tokens, size = captured_tokens(family, a), ITEMSIZE[family.target.dtype]
    disk = store_bytes(family, shape, tokens)
    batch = family.extract.batch_tokens
    waiting = PENDING_BATCHES * store_bytes(family, shape, batch)
    device_bytes = weight_bytes(family, shape) / a.gpus + _activation_bytes(shape, batch, size) + waiting
    host = PROCESS_BYTES + min(family.extract.shard_bytes, disk) + tokens * (HOST_BYTES_PER_TOKEN + 8)
    device_s = 0.0 if family.sample.keep_states else forward_s(shape, a, tokens, a.row_tokens / 2)
    wall_s = max(device_s / a.gpus, disk / a.disk_bytes_s) / a.shards
    return Estimate("extract", disk, host, device_bytes, device_s, wall_s)


def draft_parameters(family: Family, shape: Shape) -> int:
    """fc, q/k/v over twice the width, o, gated MLP, five norms and the pruned head."""
    h, d = shape.hidden_size, shape.head_dim
    width = family.train.intermediate_size or shape.intermediate_size
    attention = h * d * (3 * shape.num_attention_heads + 4 * shape.num_key_value_heads)
    head = family.vocab.draft_vocab_size * h
    return num_aux(family) * h * h + attention + 3 * h * width + 4 * h + head


def train_flops(family: Family, shape: Shape, tokens: float, supervised: float) -> float:
    """Useful FLOPs of one epoch: products forward and backward (3 x; no gradient into the captured states) and the
    teacher's head (1 x). Attention is left out: it is below a tenth for rows of a few thousand tokens.

    Rows of step 0 carry fc, keys and values; supervised rows the rest, once per TTT step.
    """
    h, d, steps = shape.hidden_size, shape.head_dim, family.train.ttt_steps
    fc = num_aux(family) * h * h
    keys_values = 4 * h * shape.num_key_value_heads * d
    width = family.train.intermediate_size or shape.intermediate_size
    layer = 3 * h * shape.num_attention_heads * d + 3 * h * width
    head = family.vocab.draft_vocab_size * h
    every_row = 2 * fc + 3 * keys_values
    every_step = 3 * (layer + head) * steps + 3 * keys_values * (steps - 1)
    return 2.0 * (tokens * every_row + supervised * (every_step + head))


def training_bytes(family: Family, shape: Shape) -> float:
    """Device memory of training: parameters with Adam, the target's two tables, a batch's features in fp32, what the
    backward keeps of every step, the loss of one chunk; and, before the first step, the closed-form start if larger
    (the Gram matrix of features and embedding in fp64, four times).
    """
    size = 4 if family.target.dtype == "float32" else 2
    h, t, steps = shape.hidden_size, family.train.batch_tokens, family.train.ttt_steps
    width, vocab = family.train.intermediate_size or shape.intermediate_size, family.vocab.draft_vocab_size
    parameters = draft_parameters(family, shape) * ADAM_BYTES
    tables = (2 * shape.vocab_size + vocab) * h * size
    rows = t * (4 * num_aux(family) * h * 2 + 4 * h)
    heads = (shape.num_attention_heads + 2 * shape.num_key_value_heads) * shape.head_dim
    kept = t * steps * size * (10 * h + 2 * heads + 4 * width)
    logits = (CPU if size == 4 else GPU).loss_logits
    chunk = logits * 4 * 4 + 4 * vocab * h  # four such arrays exist at a time
    fit = ((num_aux(family) + 1) * h) ** 2 * 8 * 4 if family.train.fit_tokens else 0
    return float(parameters + tables + max(rows + kept + chunk, fit))


def train(family: Family, shape: Shape, a: Assumptions, *, online: bool = False) -> Estimate:
    """Epochs over the training conversations on one device, which is all that training uses. Offline reads the store
    once per epoch (the slower of both counts); online adds the target's forward, by turns on the devices of a replica.
    """
    share = a.num_train / a.num_conversations
    tokens = captured_tokens(family, a) * share
    supervised = tokens * a.answer_tokens / a.row_tokens
    flops = family.train.epochs * train_flops(family, shape, tokens, supervised)
    device_s = flops / (a.device.flops * a.device.mfu)
    device_bytes = training_bytes(family, shape)
    host = PROCESS_BYTES + draft_parameters(family, shape) * 4
    disk = draft_parameters(family, shape) * (4.0 + 12.0)  # the draft, and a checkpoint with its moments
    if online:
        wall_s = device_s + family.train.epochs * forward_s(shape, a, tokens, a.row_tokens / 2) / a.gpus
        device_bytes += weight_bytes(family, shape) / a.gpus
        host += a.tokens * HOST_BYTES_PER_TOKEN
        return Estimate("train_online", disk, host, device_bytes, wall_s * a.gpus, wall_s)
    read = family.train.epochs * store_bytes(family, shape, tokens)
    return Estimate("train_offline", disk, host, device_bytes, device_s, max(device_s, read / a.disk_bytes_s))


def bench(family: Family, shape: Shape, a: Assumptions) -> Estimate:
    """Requests of one row, each engine as slow as the target alone (a draft that pays is quicker): of a question, a
    sample and a turn `repeats` of target and draft, one of each reference row; the sweep over K; longest answers.
    """
    settings = family.bench
    requests = len(settings.prompt_sets) * settings.num_prompts * settings.max_turns * settings.num_samples
    bounds = 2 * (settings.bounds and settings.greedy)
    passes = 2 * settings.repeats + settings.prompt_lookup + bounds + (settings.assistant is not None)
    swept = settings.sweep_prompts * (1 + len(settings.sweep)) if settings.sweeps else 0
    tokens = (requests * passes + swept) * settings.max_new_tokens
    step_s = decode_step_s(family, shape, a, 1, a.prompt_tokens + settings.max_new_tokens / 2)
    size = ITEMSIZE[family.target.dtype]
    device_bytes = weight_bytes(family, shape) / a.gpus + draft_parameters(family, shape) * size + 1e9
    return Estimate("bench", device_bytes=device_bytes, device_s=tokens * step_s * a.gpus, wall_s=tokens * step_s)


def _activation_bytes(shape: Shape, num_tokens: int, itemsize: int) -> float:
    """What is alive at once in an inference forward: residual, norm, q/k/v, and the MLP's two halves and product."""
    heads = (shape.num_attention_heads + 2 * shape.num_key_value_heads) * shape.head_dim
    expert = shape.experts_per_token * (shape.expert_size or 0)
    width = max(shape.intermediate_size if shape.expert_size is None else expert, expert)
    return float(num_tokens * itemsize * (4 * shape.hidden_size + 2 * heads + 3 * width))
