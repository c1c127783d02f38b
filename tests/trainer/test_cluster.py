"""Task clusters of a stream, against domains that are known."""

import random
from collections import Counter

import pytest
import torch

from onlinespec.trainer.cluster import NUM_FEATURES, Clusters, pooled

SPREAD = 0.15
"""of a request's features around its domain's centre, in a space of 40 directions"""


def domain_points(num_domains: int, num_each: int, seed: int = 0) -> list[tuple[int, torch.Tensor]]:
    """(domain, point): centres share most of their direction, as hidden states do. Shapes: points [F]."""
    generator = torch.Generator().manual_seed(seed)
    common_F = 4 * torch.nn.functional.one_hot(torch.tensor(0), NUM_FEATURES).float()
    directions_RF = torch.randn(40, NUM_FEATURES, generator=generator) / NUM_FEATURES**0.5
    points = []
    for domain in range(num_domains):
        centre_F = common_F + 3 * torch.randn(NUM_FEATURES, generator=generator) / NUM_FEATURES**0.5
        for _ in range(num_each):
            noise_F = SPREAD * torch.randn(40, generator=generator) @ directions_RF
            points.append((domain, torch.nn.functional.normalize(centre_F + noise_F, dim=0)))
    return points


def assigned(clusters: Clusters, points) -> list[tuple[int, int]]:
    """(domain, cluster) of each point, clusters that became one renamed."""
    found: list[tuple[int, int]] = []
    for domain, point_F in points:
        assignment = clusters.add(point_F)
        for gone, into in assignment.merged:
            found = [(name, into if cluster == gone else cluster) for name, cluster in found]
        found.append((domain, assignment.cluster))
    return found


def shuffled(points, seed: int):
    points = list(points)
    random.Random(seed).shuffle(points)
    return points


ORDERS = {
    "one domain after the other": lambda points: points,
    "backwards": lambda points: points[::-1],
    "mixed": lambda points: shuffled(points, 1),
    "mixed otherwise": lambda points: shuffled(points, 2),
}


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS.keys())
@pytest.mark.parametrize("num_domains", [1, 2, 5])
def test_each_domain_is_one_cluster_in_whatever_order_its_requests_come(order, num_domains: int):
    clusters = Clusters(8)

    found = assigned(clusters, order(domain_points(num_domains, 60)))

    assert len(clusters) == num_domains
    assert len(set(found)) == num_domains


def test_the_scale_of_the_hidden_states_does_not_matter():
    narrow = [
        (domain, torch.nn.functional.normalize(point_F + 30 * torch.eye(NUM_FEATURES)[0], dim=0))
        for domain, point_F in shuffled(domain_points(3, 60), 0)
    ]
    clusters = Clusters(8)

    found = assigned(clusters, narrow)

    assert len(clusters) == len(set(found)) == 3


def test_there_are_never_more_clusters_than_allowed_and_the_nearest_become_one():
    points = domain_points(6, 30)
    close_F = torch.nn.functional.normalize(points[0][1] * 0.6 + points[30][1] * 0.4, dim=0)
    clusters = Clusters(3)
    sizes = []

    for _, point_F in [*shuffled(points, 3), (6, close_F)]:
        clusters.add(point_F)
        sizes.append(len(clusters))

    assert sizes[:31] == list(range(1, 32)), "none is merged before the scale is known"
    assert max(sizes[31:]) == 3
    assert [Clusters(1).add(point_F).cluster for _, point_F in points] == [0] * len(points)


def test_more_tasks_than_clusters_fill_them_and_do_not_all_become_one():
    clusters = Clusters(8)

    assigned(clusters, shuffled(domain_points(12, 40), 0))

    assert len(clusters) == 8


def test_a_cluster_follows_a_domain_that_moves_slowly():
    points = domain_points(2, 600)
    drift_F = 1.2 * torch.randn(NUM_FEATURES, generator=torch.Generator().manual_seed(9)) / NUM_FEATURES**0.5
    moving = [
        (domain, torch.nn.functional.normalize(point_F + (step % 600) / 600 * drift_F * (domain == 0), dim=0))
        for step, (domain, point_F) in enumerate(points)
    ]
    pairs = [point for pair in zip(moving[:600], moving[600:], strict=True) for point in pair]
    clusters = Clusters(8)

    found = assigned(clusters, pairs)

    assert set(Counter(found).values()) == {600}
    assert clusters.num_requests == [500, 500], "a centre forgets, or it could not follow"


def test_a_new_domain_opens_a_cluster_at_its_first_request():
    points = domain_points(3, 60)
    clusters = Clusters(8)
    known = {cluster for _, cluster in assigned(clusters, points[:120])}

    newcomer = clusters.add(points[120][1])

    assert newcomer.cluster not in known
    assert newcomer.merged == ()


def test_to_ask_for_the_nearest_changes_nothing():
    points = domain_points(2, 40)
    clusters, twin = Clusters(8), Clusters(8)
    found = assigned(clusters, points)
    assigned(twin, points)

    nearest = {clusters.nearest(point_F) for domain, point_F in points if domain == 0}

    assert nearest == {cluster for domain, cluster in found if domain == 0}
    assert str(clusters.state()) == str(twin.state())
    assert Clusters(8).nearest(points[0][1]) is None


def test_a_resumed_stream_gives_the_assignments_of_an_unbroken_one():
    points = shuffled(domain_points(4, 50), 4)
    unbroken, first, second = Clusters(6), Clusters(6), Clusters(6)
    wanted = [unbroken.add(point_F) for _, point_F in points]

    found = [first.add(point_F) for _, point_F in points[:30]]
    second.load_state(first.state())
    found += [second.add(point_F) for _, point_F in points[30:]]

    assert found == wanted


def test_a_request_is_the_mean_of_its_rows_at_unit_length_and_missing_rows_do_not_count():
    generator = torch.Generator().manual_seed(0)
    aux_TA = torch.randn(5, 12, generator=generator)
    has_aux_T = torch.tensor([True, True, False, True, True])
    scaled_TA = aux_TA * torch.tensor([1000.0, 1.0, 7.0, 0.1, 3.0])[:, None]

    point_F = pooled(scaled_TA, has_aux_T)
    alone_F = [pooled(row_A[None], torch.ones(1, dtype=torch.bool)) for row_A in aux_TA]

    assert point_F.shape == (NUM_FEATURES,)
    assert float(point_F.norm()) == pytest.approx(1.0)
    reference = sum(
        row_F * pooled_norm(row_A) for row_F, row_A, has in zip(alone_F, aux_TA, has_aux_T, strict=True) if has
    )
    torch.testing.assert_close(point_F, reference / reference.norm())
    assert not bool(pooled(aux_TA, torch.zeros(5, dtype=torch.bool)).any())


def pooled_norm(row_A: torch.Tensor) -> float:
    """Length that a row at unit length has after folding: a loop over its channels."""
    unit_A = row_A / row_A.norm()
    axes = [pooled(torch.eye(len(row_A))[i][None], torch.ones(1, dtype=torch.bool)) for i in range(len(row_A))]
    return float(sum(value * axis_F for value, axis_F in zip(unit_A, axes, strict=True)).norm())
