"""Core's router, for rows with padding: what fills a row up counts neither for balance nor for the bias of experts.

Rows are filled up where the layout asks for it (`engine/row_part.py`), so what padding counted for would depend on the
layout. Core takes a mask of it; these are the two places where it does not get by with that mask alone.
"""

import torch
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor


class PackedRouter(TopKRouter):
    """Routes each token to its best experts."""

    def _apply_aux_loss(
        self, probs: Tensor, scores_for_aux_loss: Tensor, routing_map: Tensor, with_padding_mask: bool = False
    ) -> Tensor:
        """Attach the load-balancing loss of a row, E * coefficient * sum_i f_i P_i, to the probabilities.

        f_i is the part of the row's choices that expert i got, P_i its mean score (Switch Transformer,
        arXiv:2101.03961, eq. 4). Core's own divides by the number of tokens, which is 0 in the row of a rank without
        work; such a row has the loss 0. It also weighs each rank's part of the loss by the tokens that are left of its
        part of the row, of which padding leaves unequal numbers, and not by the row's. Collective over the ranks that
        share a row's tokens.

        Args:
            probs: [tokens, E], of which the router's output is made.
            scores_for_aux_loss: [tokens, E], 0 on padding.
            routing_map: [tokens, E] bool, false on padding.
            with_padding_mask: whether there was a mask; without it every token counts.
        """
        coefficient = self.get_aux_loss_coeff("aux_loss")
        if not coefficient or not with_padding_mask:
            return super()._apply_aux_loss(probs, scores_for_aux_loss, routing_map, with_padding_mask)
        of_row = reduce_from_tensor_model_parallel_region(routing_map.sum(dim=0), self.tp_cp_group)
        tokens = (of_row.sum() / self.topk).clamp(min=1)
        parts = of_row / (self.topk * tokens)
        loss = coefficient * self.config.num_moe_experts * (parts * scores_for_aux_loss.sum(dim=0) / tokens).sum()
        return self.attach_and_log_load_balancing_loss(
            probs,
            coefficient,
            loss,
            "load_balancing_loss",
            self.tp_cp_group,
            valid_token_count=tokens / self.tp_cp_group.size(),
        )

    def _apply_expert_bias(self, routing_map: Tensor, padding_mask: Tensor | None = None) -> None:
        """Count the choices, by which the bias of experts is moved after the step; [tokens, E] and [tokens].

        Core's own lays the mask over the experts in place of the tokens.
        """
        if self.enable_expert_bias and torch.is_grad_enabled():
            counted = routing_map if padding_mask is None else routing_map[~padding_mask]
            self.local_tokens_per_expert += counted.sum(dim=0)
