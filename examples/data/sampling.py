"""Which data an epoch sees, and in which order."""

from __future__ import annotations

from collections.abc import Iterator

import lightning
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler


class FreshSeeds(Sampler):
    """``length`` indices an epoch, none of which occurs twice in a run: for data that are made from their index."""

    def __init__(self, length: int, seed: int):
        self.length, self.seed = length, seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning at the start of each epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        # A generator: going on from a checkpoint, Lightning asks for the iterator before it tells the epoch.
        start = first_seed(self.seed) + self.epoch * self.length
        yield from range(start, start + self.length)

    def __len__(self) -> int:
        return self.length


class Shuffled(FreshSeeds):
    """The indices 0 .. length - 1 in an order that depends on the seed and the epoch."""

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(self.length, generator=epoch_generator(self.seed, self.epoch)).tolist())


class Batches(DistributedSampler):
    """Whole batches (epoch, indices), for a DataLoader with ``batch_size=None``; each process gets its share of each.

    The shares of the processes together are the batch of a single process. It is a DistributedSampler because Lightning
    leaves only those as they are when there are several processes.

    Args:
        length: of the dataset.
        batch_size: of all processes together.
        seed: of the order, which also depends on the epoch; the last incomplete batch is left out. None takes all
            indices, as they come.
        rank, world_size: of this process.
    """

    def __init__(self, length: int, batch_size: int, seed: int | None = None, *, rank: int = 0, world_size: int = 1):
        if batch_size < 1 or batch_size % world_size:
            raise ValueError(f"batch_size is {batch_size}; it takes a multiple of the {world_size} processes")
        if seed is not None and length < batch_size:
            raise ValueError(f"batch_size is {batch_size}; it takes at most the {length} items of the dataset")
        super().__init__(range(length), world_size, rank)
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.used = length if seed is None else length // batch_size * batch_size

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        # A generator, as in FreshSeeds.
        order = torch.arange(self.length)
        if self.seed is not None:
            order = torch.randperm(self.length, generator=epoch_generator(self.seed, self.epoch))
        share = order[: self.used][self.rank :: self.num_replicas]
        for indices in share.split(self.batch_size // self.num_replicas):
            yield self.epoch, indices

    def __len__(self) -> int:
        mine = len(range(self.rank, self.used, self.num_replicas))
        return -(-mine * self.num_replicas // self.batch_size)


def batch_loader(dataset: Dataset, batch_size: int, trainer: lightning.Trainer | None, workers: int = 0) -> DataLoader:
    """The batches of this process, made in it or by workers, from a dataset whose items are whole batches.

    Args:
        dataset: takes the items of :class:`Batches`; has a length and ``seed``, the order's seed or None.
        batch_size: of all processes together.
        trainer: knows the processes; None is a single one.
        workers: processes that make batches, for pictures that are not in memory.
    """
    rank, world_size = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
    sampler = Batches(len(dataset), batch_size, dataset.seed, rank=rank, world_size=world_size)
    return DataLoader(dataset, batch_size=None, sampler=sampler, num_workers=workers)


def first_seed(seed: int) -> int:
    """Where the seeds that belong to one seed of the user begin: a milliard of them."""
    return seed * 1_000_000_000


def epoch_generator(seed: int, epoch: int, stream: int = 0) -> torch.Generator:
    """The random numbers of an epoch; those of different streams have nothing to do with each other."""
    return torch.Generator().manual_seed(first_seed(seed) + stream * 100_000_000 + epoch)


def flip(pictures: Tensor, flips: Tensor) -> Tensor:
    """The pictures (N, C, H, W), mirrored where flips (N,) is true."""
    # Whole pictures are copied at once, which torch.where would do pixel by pixel.
    chosen = torch.arange(len(pictures)) + len(pictures) * flips
    return torch.cat([pictures, pictures.flip(3)]).index_select(0, chosen)
