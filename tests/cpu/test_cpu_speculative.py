"""Tree kernels against loops that follow the Triton kernels they stand for. Exact."""

import pytest
import torch

from onlinespec.cpu.errors import UnsupportedOnCpuError
from onlinespec.cpu.speculative import (
    QLEN_ONLY,
    build_tree_kernel_efficient_cpu,
    fill_accept_out_cache_loc_cpu,
    fill_bonus_tokens_cpu,
    verify_tree_greedy_cpu,
)


def draft_candidates(topk, depth, num_nodes, seed):
    """Draft a tree as SGLang does: topk candidates, then topk * topk per step of which topk go on."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(1, topk, generator=generator).sort(descending=True).values
    all_scores, parents = [scores], [torch.arange(-1, topk)[None]]
    for step in range(1, depth):
        grown = scores[:, :, None] * torch.rand(1, topk, topk, generator=generator)
        all_scores.append(grown.flatten(1))
        scores, index = grown.flatten(1).topk(topk, dim=-1)
        parents.append(index + topk * topk * (step - 1) + topk)
    selected = torch.cat(all_scores, 1).topk(num_nodes - 1, dim=-1).indices.sort().values
    parent_list = torch.cat(parents[:-1], 1) if len(parents) > 1 else torch.empty(1, 0, dtype=torch.long)
    return parent_list[0], selected[0]


def empty_outputs(num, nodes):
    mask = torch.ones(num * nodes * nodes, dtype=torch.bool)
    positions = torch.empty(num * nodes, dtype=torch.long)
    return mask, positions, *torch.full((3, num, nodes), -1)


def build_by_loop(parents, selected, length, topk, depth, nodes):
    """Follow sgl_build_tree_kernel_efficient_triton for one request."""
    next_token, next_sibling = [-1] * nodes, [-1] * nodes
    mask = [[column == 0 for column in range(nodes)] for _ in range(nodes)]
    positions = [length] * nodes
    for i in range(nodes - 1, 0, -1):
        level, parent = selected[i - 1] // topk, 0
        if level:
            if parents[level] not in selected:
                continue
            parent = selected.index(parents[level]) + 1
        if next_token[parent] != -1:
            next_sibling[i] = next_token[parent]
        next_token[parent] = i
    for i in range(1, nodes):
        current = i - 1
        for _ in range(depth):
            positions[i] += 1
            mask[i][current + 1] = True
            level = selected[current] // topk
            if not level or parents[level] not in selected:
                break
            current = selected.index(parents[level])
    return mask, positions, next_token, next_sibling


def check_against_loop(parents, selected, lengths, topk, depth, nodes):
    outputs = empty_outputs(len(lengths), nodes)

    build_tree_kernel_efficient_cpu(parents, selected, torch.tensor(lengths), *outputs, topk, depth, nodes, QLEN_ONLY)

    mask, positions, index, next_token, next_sibling = outputs
    assert index.tolist() == [[b * nodes + i for i in range(nodes)] for b in range(len(lengths))]
    for b, length in enumerate(lengths):
        expected = build_by_loop(parents[b].tolist(), selected[b].tolist(), length, topk, depth, nodes)
        assert mask.view(-1, nodes, nodes)[b].tolist() == expected[0]
        assert positions.view(-1, nodes)[b].tolist() == expected[1]
        assert next_token[b].tolist() == expected[2]
        assert next_sibling[b].tolist() == expected[3]


@pytest.mark.parametrize(("topk", "depth", "nodes"), [(4, 3, 8), (2, 5, 9), (8, 2, 20), (3, 1, 4), (4, 4, 5)])
def test_a_tree_has_the_links_mask_and_positions_of_the_triton_kernel(topk, depth, nodes):
    drafted = [draft_candidates(topk, depth, nodes, seed) for seed in range(5)]

    check_against_loop(
        torch.stack([d[0] for d in drafted]),
        torch.stack([d[1] for d in drafted]),
        [3, 17, 1, 200, 5],
        topk,
        depth,
        nodes,
    )


@pytest.mark.parametrize("depth", [1, 3, 7])
def test_a_chain_is_built_without_looking_at_the_candidates(depth):
    parents = torch.tensor([list(range(-1, depth - 1))] * 3) if depth > 1 else torch.empty(3, 0, dtype=torch.long)

    check_against_loop(parents, torch.arange(depth).repeat(3, 1), [4, 1, 90], 1, depth, depth + 1)


def test_a_node_whose_parent_was_not_selected_is_linked_to_nothing():
    parents = torch.tensor([[-1, 0, 1, 2, 4]])
    selected = torch.tensor([[0, 2, 7]])  # 7 hangs on 1, which is missing

    check_against_loop(parents, selected, [10], 2, 3, 4)


def test_a_mask_over_the_whole_prefix_is_refused():
    outputs = empty_outputs(1, 2)

    with pytest.raises(UnsupportedOnCpuError, match="tree_mask_mode = 0"):
        build_tree_kernel_efficient_cpu(torch.empty(1, 0), torch.tensor([[0]]), torch.tensor([3]), *outputs, 1, 1, 2, 0)


def verify_by_loop(candidates, next_token, next_sibling, wanted, max_path):
    path, current = [0], 0
    for _ in range(1, max_path):
        child = next_token[current]
        while child != -1 and candidates[child] != wanted[current]:
            child = next_sibling[child]
        if child == -1:
            break
        path.append(child)
        current = child
    return path


@pytest.mark.parametrize(("topk", "depth", "nodes"), [(1, 3, 4), (4, 3, 8), (2, 5, 12), (8, 3, 30)])
def test_verification_accepts_the_path_the_target_would_have_taken(topk, depth, nodes):
    generator = torch.Generator().manual_seed(topk)
    num, max_path = 16, depth + 1
    drafted = [draft_candidates(topk, depth, nodes, seed) for seed in range(num)]
    outputs = empty_outputs(num, nodes)
    parents, selected = (torch.stack(part) for part in zip(*drafted, strict=True))
    build_tree_kernel_efficient_cpu(parents, selected, torch.arange(num), *outputs, topk, depth, nodes, QLEN_ONLY)
    index, next_token, next_sibling = outputs[2:]
    candidates = torch.randint(0, 3, (num, nodes), generator=generator)
    wanted = torch.randint(0, 3, (num, nodes), generator=generator)
    predicts = torch.zeros(num * nodes, dtype=torch.int32)
    accept_index = torch.full((num, max_path), -1, dtype=torch.int32)
    counts = torch.empty(num, dtype=torch.int32)

    verify_tree_greedy_cpu(
        predicts=predicts,
        accept_index=accept_index,
        accept_token_num=counts,
        candidates=candidates,
        retrive_index=index,
        retrive_next_token=next_token,
        retrive_next_sibling=next_sibling,
        target_predict=wanted,
    )

    written = torch.zeros(num, nodes, dtype=torch.int32)
    for b in range(num):
        links = candidates[b].tolist(), next_token[b].tolist(), next_sibling[b].tolist()
        path = verify_by_loop(*links, wanted[b].tolist(), max_path)
        assert accept_index[b].tolist() == [b * nodes + i for i in path] + [-1] * (max_path - len(path))
        assert counts[b] == len(path) - 1
        written[b, path] = wanted[b, path].int()
    assert torch.equal(predicts.view(num, nodes), written)
    assert int(counts.max()) > 0


def test_accepted_slots_are_packed_in_order():
    accept_index = torch.tensor([[0, 2, -1], [4, -1, -1], [8, 9, 11]], dtype=torch.int32)
    slots = torch.arange(12) * 10
    packed = torch.zeros(9, dtype=torch.int64)

    fill_accept_out_cache_loc_cpu(accept_index, slots, packed)

    assert packed.tolist() == [0, 20, 40, 80, 90, 110, 0, 0, 0]


@pytest.mark.parametrize("shape", [(3, 4), (12,)])
def test_the_bonus_token_is_the_last_emitted_one(shape):
    tokens = torch.arange(100, 112, dtype=torch.int32).view(shape)
    bonus = torch.zeros(3, dtype=torch.int32)

    fill_bonus_tokens_cpu(tokens, torch.tensor([1, 4, 2], dtype=torch.int32), bonus, 4)

    assert bonus.tolist() == [100, 107, 109]
