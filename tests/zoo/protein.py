"""RFD4-Proteina: one token for each residue of a protein."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .entry import Draw, Entry, newer, seeded

RFD4ProteinaTransformer = newer("RFD4ProteinaTransformer")

RESIDUES = 37
TIMES = ("time_emb_bb_ca", "time_emb_local_latents")


def protein(seed: int = 0) -> dict[str, Any]:
    draw = Draw(seed)
    return {
        "bb_ca": draw(1, RESIDUES, 3),
        "local_latents": draw(1, RESIDUES, 5),
        "bb_ca_time": draw.sigma(),
        "local_latents_time": draw.sigma(),
        "padding_mask": torch.ones(1, RESIDUES, dtype=torch.bool),
        "conditioning": {
            "is_in_context_conditioning": torch.zeros(1, RESIDUES, dtype=torch.bool),
            "supports_local_latent": torch.ones(1, RESIDUES, dtype=torch.bool),
        },
        "return_dict": False,
    }


def build_protein() -> nn.Module:
    config = {
        "nlayers": 2,
        "token_dim": 24,
        "nheads": 2,
        "dim_cond": 16,
        "pair_repr_dim": 14,
        "latent_dim": 5,
        "token_type_emb_dim": 8,
        "cath_emb_dim": 8,
        "t_emb_dim": 10,
        "seq_sep_dim": 9,
        "xt_pair_dist_dim": 6,
        "feats_seq": ("xt_bb_ca", "xt_local_latents"),
        "feats_cond_seq": TIMES,
        "feats_pair_repr": ("xt_bb_ca_pair_dists",),
        "feats_pair_cond": TIMES,
        "update_pair_repr_every_n": 2,
        "tri_mult_c": 7,
        "num_sequence_classes": 11,
    }
    return seeded(lambda: RFD4ProteinaTransformer(**config))


ENTRIES = (
    Entry(
        "RFD4ProteinaTransformer",
        build_protein,
        protein,
        (RESIDUES, 1, 1),
        {"bb_ca": 1, "local_latents": 1, "padding_mask": 1},
        note="a representation of all pairs of tokens [B, N, N, C] biases attention and is updated by products over "
        "a third token; several outputs, one of them [B, N, N]",
    ),
)
