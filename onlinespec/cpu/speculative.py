"""Building and verifying token trees, in plain torch.

Trees are small (tens of nodes), so their links are followed in Python lists; a chain (topk = 1) needs none of it and is
written in one go.

Shape suffixes: B requests, N tree nodes of a request, the root (the bonus token) counted.
"""

import torch

from onlinespec.cpu.errors import UnsupportedOnCpuError, unsupported_argument_message

QLEN_ONLY = 1  # SGLang's TreeMaskMode for a mask of N x N per request; the CPU path uses no other.


def _build_chains(
    lengths_B: torch.Tensor,
    tree_mask: torch.Tensor,
    positions: torch.Tensor,
    retrieve_index: torch.Tensor,
    retrieve_next_token: torch.Tensor,
    num_nodes: int,
) -> None:
    nodes = torch.arange(num_nodes)
    tree_mask.view(-1, num_nodes, num_nodes).copy_(nodes <= nodes[:, None])
    torch.add(lengths_B[:, None], nodes, out=positions.view(-1, num_nodes))
    retrieve_index.copy_(torch.arange(retrieve_index.numel()).view_as(retrieve_index))
    retrieve_next_token[:, :-1] = nodes[1:]


def _parents(selected: list[int], parents: list[int], topk: int) -> list[int | None]:
    """Return each node's parent node; None for the root and for a node whose parent was not selected."""
    node_of: dict[int, int] = {}
    for node, candidate in enumerate(selected, start=1):
        node_of.setdefault(candidate, node)
    found: list[int | None] = [None]
    for candidate in selected:
        level = candidate // topk
        found.append(0 if level == 0 else node_of.get(parents[level]))
    return found


def _links(parent_of: list[int | None]) -> tuple[list[int], list[int]]:
    """Return each node's first child and next sibling, -1 where there is none."""
    child, sibling = [-1] * len(parent_of), [-1] * len(parent_of)
    for node in range(len(parent_of) - 1, 0, -1):
        parent = parent_of[node]
        if parent is not None:
            sibling[node] = child[parent]
            child[parent] = node
    return child, sibling


def _paths(parent_of: list[int | None], depth: int) -> list[list[int]]:
    """Return each node's way up to, not including, the root: at most `depth` nodes, itself first."""
    paths: list[list[int]] = []
    for node in range(len(parent_of)):
        path: list[int] = []
        step: int | None = node
        while step and len(path) < depth:
            path.append(step)
            step = parent_of[step]
        paths.append(path)
    return paths


def build_tree_kernel_efficient_cpu(
    parent_list: torch.Tensor,
    selected_index: torch.Tensor,
    verified_seq_len: torch.Tensor,
    tree_mask: torch.Tensor,
    positions: torch.Tensor,
    retrieve_index: torch.Tensor,
    retrieve_next_token: torch.Tensor,
    retrieve_next_sibling: torch.Tensor,
    topk: int,
    depth: int,
    draft_token_num: int,
    tree_mask_mode: int,
) -> None:
    """Write the tree that the selected draft candidates make: who sees whom, at which position, and its links.

    Shapes: parent_list int64 [B, 1 + (depth - 1) * topk] or [B, 0]; selected_index int64 [B, N - 1], ascending;
    verified_seq_len int [B]; written: tree_mask bool [B * N * N], positions int64 [B * N], retrieve_index,
    retrieve_next_token and retrieve_next_sibling int64 [B, N] (the last two arrive filled with -1).
    Raises: UnsupportedOnCpuError for a mask mode other than QLEN_ONLY.
    Source: SGLang 0.5.23, kernels/ops/speculative/spec_tree.py, sgl_build_tree_kernel_efficient_triton.
    """
    if int(tree_mask_mode) != QLEN_ONLY:
        raise UnsupportedOnCpuError(
            unsupported_argument_message("build_tree_kernel_efficient_cpu", "tree_mask_mode", tree_mask_mode)
        )
    if topk == 1 and draft_token_num == depth + 1:
        _build_chains(verified_seq_len, tree_mask, positions, retrieve_index, retrieve_next_token, draft_token_num)
        return
    masks, places, children, siblings = [], [], [], []
    lengths, all_parents = verified_seq_len.tolist(), parent_list.tolist()
    for length, selected, parents in zip(lengths, selected_index.tolist(), all_parents, strict=True):
        parent_of = _parents(selected, parents, topk)
        child, sibling = _links(parent_of)
        paths = _paths(parent_of, depth)
        masks.append([[column == 0 or column in path for column in range(draft_token_num)] for path in paths])
        places.append([length + len(path) for path in paths])
        children.append(child)
        siblings.append(sibling)
    tree_mask.copy_(torch.tensor(masks, dtype=torch.bool).view(-1))
    positions.copy_(torch.tensor(places).view(-1))
    retrieve_index.copy_(torch.arange(retrieve_index.numel()).view_as(retrieve_index))
    retrieve_next_token.copy_(torch.tensor(children))
    retrieve_next_sibling.copy_(torch.tensor(siblings))


def verify_tree_greedy_cpu(
    predicts: torch.Tensor,
    accept_index: torch.Tensor,
    accept_token_num: torch.Tensor,
    candidates: torch.Tensor,
    retrive_index: torch.Tensor,
    retrive_next_token: torch.Tensor,
    retrive_next_sibling: torch.Tensor,
    target_predict: torch.Tensor,
) -> None:
    """Walk each tree from its root along the children that equal the target's choice.

    Shapes: candidates, retrive_* and target_predict int64 [B, N]; written: predicts int32 [B * N], the target's choice
    at every accepted node; accept_index int32 [B, P], the flat indices of the root and of the accepted nodes (arrives
    filled with -1); accept_token_num int32 [B], accepted nodes, the root not counted.
    Source: SGLang 0.5.23, kernels/ops/speculative/spec_tree.py, verify_tree_greedy_kernel_triton.
    """
    max_path = accept_index.shape[1]
    chosen = target_predict.view(candidates.shape).tolist()
    flat = retrive_index.tolist()
    accepted, counts, rows, values = [], [], [], []
    trees = zip(candidates.tolist(), retrive_next_token.tolist(), retrive_next_sibling.tolist(), strict=True)
    for b, (drafted, child, sibling) in enumerate(trees):
        node, path = 0, [0]
        while len(path) < max_path:
            wanted, step = chosen[b][node], child[node]
            while step != -1 and drafted[step] != wanted:
                step = sibling[step]
            if step == -1:
                break
            node = step
            path.append(node)
        rows += [flat[b][step] for step in path]
        values += [chosen[b][step] for step in path]
        accepted.append([flat[b][step] for step in path] + [-1] * (max_path - len(path)))
        counts.append(len(path) - 1)
    predicts[torch.tensor(rows)] = torch.tensor(values, dtype=predicts.dtype)
    accept_index.copy_(torch.tensor(accepted))
    accept_token_num.copy_(torch.tensor(counts))


def fill_accept_out_cache_loc_cpu(
    accept_index: torch.Tensor, out_cache_loc: torch.Tensor, accept_out_cache_loc: torch.Tensor
) -> None:
    """Pack the cache slots of the accepted nodes.

    Shapes: accept_index int [B * P], -1 where nothing was accepted; out_cache_loc int64 [B * N];
    accept_out_cache_loc int64 [at least the accepted nodes], its head written.
    Source: SGLang 0.5.23, kernels/ops/speculative/eagle.py, fill_accept_out_cache_loc.
    """
    index = accept_index.view(-1)
    slots = out_cache_loc[index[index > -1].long()]
    accept_out_cache_loc[: slots.numel()] = slots


def fill_bonus_tokens_cpu(
    accept_tokens: torch.Tensor, accept_lens: torch.Tensor, bonus_tokens: torch.Tensor, accept_stride: int
) -> None:
    """Write each request's last emitted token.

    Shapes: accept_tokens int [B * accept_stride]; accept_lens int [B], the bonus token counted;
    bonus_tokens int32 [B], written.
    Source: SGLang 0.5.23, kernels/ops/speculative/eagle.py, fill_bonus_tokens.
    """
    num = accept_lens.shape[0]
    last = torch.arange(num) * accept_stride + accept_lens - 1
    bonus_tokens[:num] = accept_tokens.view(-1)[last]
