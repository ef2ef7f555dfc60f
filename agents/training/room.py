"""The memory that a run needs at least, asked before it is built."""

from __future__ import annotations

import torch

from agents.training.config import TrainConfig
from avatarl_env.lm.gpt import LAYER_BYTES
from avatarl_env.lm.head_reader import WHOLE_UP_TO
from avatarl_env.memory import check_memory, memory_limit

FLOAT, DOUBLE, TOKEN = 4, 8, 8  # bytes
TRANSITION = 2 * 16 * FLOAT  # of a replay buffer: two observations, of more numbers than that


def check_room(
    config: TrainConfig, vocab_size: int, device: torch.device, n_processes: int = 1
) -> None:
    """Refuse a run that cannot fit the memory.

    The operations side by side are not counted here: the environment does so itself.

    What is counted is the least that each part takes, so that nothing is refused that would have
    run. L layers, C channels, V characters.

    Args:
        config: of the run.
        vocab_size: V.
        device: where the model is.
        n_processes: that share each batch.

    Raises:
        ValueError: names the setting, what it needs and what there is.
    """
    limit = memory_limit()
    if device.type == "cuda":
        limit = max(limit, torch.cuda.get_device_properties(device).total_memory)
    sizes = config.lm.with_vocabulary(vocab_size)
    copies = 3 if config.grpo.sync_every == 1 else 4  # with the gradient and one moment
    model = copies * FLOAT * sizes.n_parameters + LAYER_BYTES * sizes.n_layers
    check_memory("lm (n_layers, width)", max(model, sizes.building_bytes), limit)
    check_memory("batch_size", model + _update(config, vocab_size) // n_processes, limit)
    operation, curriculum = config.operation, config.curriculum
    length = operation.prompt_length + operation.n_new
    text = TOKEN * length + FLOAT * operation.n_new
    if vocab_size <= WHOLE_UP_TO:
        text += DOUBLE * operation.n_new * vocab_size  # the distributions that it is scored by
    buffer = config.surgeon_options.get("buffer_size")
    if isinstance(buffer, int):
        check_memory("buffer_size", model + buffer * TRANSITION, limit)
    window = TOKEN * (config.lm.context + 1)
    check_memory("paired_prompts", model + curriculum.paired_prompts * (text + window), limit)


def _update(config: TrainConfig, vocab_size: int) -> int:
    """Return the bytes that an update keeps for its backward, of all processes together."""
    grpo, lm = config.grpo, config.lm
    n_windows = grpo.batch_size if grpo.horizon == 1 else grpo.batch_size * grpo.group_size
    length = lm.context if grpo.horizon == 1 else grpo.horizon
    half = FLOAT // 2  # where the products are in half precision
    kept = half * 10 * lm.n_layers * lm.width + FLOAT * 2 * vocab_size
    drawn = (FLOAT + TOKEN) * grpo.group_size if grpo.horizon == 1 else FLOAT + TOKEN
    return n_windows * length * (kept + drawn)
