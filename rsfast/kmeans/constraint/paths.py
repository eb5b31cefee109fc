"""Successive shortest paths between clusters, in NumPy: the host's half of the exact size constraint."""

import heapq

import numpy as np

from rsfast.kmeans.constraint.fixed import FAR, chunks


def shortest_paths(
    lower: np.ndarray,  # (K,) int64, as all that follow
    upper: np.ndarray,  # (K,)
    counts: np.ndarray,  # (K,), changed in place
    subsidies: np.ndarray,  # (K,), changed in place
    gaps: np.ndarray,  # (P, K)
    labels: np.ndarray,  # (P,), changed in place
    reach: int,
) -> bool:
    """Move points between clusters until every size fits, each time along the cheapest chain of moves.

    The P points given are those of all N for which some cluster other than their own costs at most ``reach`` more than
    it, both less their subsidy; a point may be left out only if none does. Where a decision hangs on the others,
    what was done so far stands and False is returned: call again with a greater reach. True: every size fits, and

    * every label is one of the ``argmin_k gaps[i, k] - subsidies[k]``;
    * a positive subsidy means ``counts[k] == lower[k]``, a negative one ``counts[k] == upper[k]``,

    so that labels and subsidies prove each other optimal (complementary slackness). All numbers are integers and no sum
    overflows: nothing is rounded. Ties: the nearest cluster of the lowest index, then the point of the lowest row.
    """
    return _Graph(lower, upper, counts, subsidies, gaps, labels, reach).solve()


class _Graph:
    """K clusters and a hub, which stands for the sizes: a unit into it makes a cluster larger, one out smaller."""

    def __init__(self, lower, upper, counts, subsidies, gaps, labels, reach):
        self.lower, self.upper, self.counts, self.subsidies = lower, upper, counts, subsidies
        self.gaps, self.labels, self.hub = gaps, labels, len(counts)
        self.sizes = np.select([subsidies > 0, subsidies < 0], [lower, upper], np.clip(counts, lower, upper))
        self.excess = np.append(counts - self.sizes, self.sizes.sum() - counts.sum())
        # what the lists leave out costs at least this much
        self.floor = np.full((self.hub, self.hub), FAR)
        if reach < FAR:
            self.floor = reach + 1 + subsidies[None, :] - subsidies[:, None]
        self.moves = self._lists(reach)
        self.weight = np.stack([self._row(a) for a in range(self.hub)])

    def _lists(self, reach):
        """Of every ordered pair of clusters the points that may move, as heaps of (cost, row)."""
        moves = [[[] for _ in range(self.hub)] for _ in range(self.hub)]
        for rows in chunks(self.hub, len(self.labels)):
            labels, gaps = self.labels[rows], self.gaps[rows]
            deltas = gaps - np.take_along_axis(gaps, labels[:, None], 1)
            near = deltas - self.subsidies[None, :] + self.subsidies[labels][:, None] <= reach
            near[np.arange(len(near)), labels] = False
            for row, target in zip(*near.nonzero(), strict=True):
                moves[labels[row]][target].append((int(deltas[row, target]), rows.start + int(row)))
        for heaps in moves:
            for heap in heaps:
                heapq.heapify(heap)
        return moves

    def _row(self, source):
        """Cost of the cheapest move from ``source`` to every cluster."""
        weight = np.full(self.hub, FAR)
        for target, heap in enumerate(self.moves[source]):
            while heap and self.labels[heap[0][1]] != source:
                heapq.heappop(heap)
            if heap:
                weight[target] = heap[0][0]
        return weight

    def solve(self) -> bool:
        while (self.excess > 0).any():
            path = self._shortest()
            if path is None:
                return False
            while self._push(path):
                pass
        return True

    def _shortest(self):
        """Nodes from one with too much to the nearest with too little, and subsidies that make all its arcs free."""
        hub = self.hub
        distance = np.where(self.excess > 0, 0, FAR)
        parent, settled, unknown = np.full(hub + 1, -1), np.zeros(hub + 1, bool), FAR
        while True:
            node = int(np.where(settled, FAR, distance).argmin())
            here = distance[node]
            if settled[node] or here >= unknown or here >= FAR:
                return None
            settled[node] = True
            if self.excess[node] < 0:
                break
            arcs = np.full(hub + 1, FAR)
            if node == hub:
                arcs[:hub] = np.where(self.sizes > self.lower, -self.subsidies, FAR)
            else:
                change = self.subsidies[node] - self.subsidies
                known = self.weight[node] < self.floor[node]
                arcs[:hub] = np.where(known, self.weight[node] + change, FAR)
                open_ended = ~known & ~settled[:hub] & (self.floor[node] < FAR)
                if self.counts[node] and open_ended.any():
                    unknown = min(unknown, here + (self.floor[node] + change)[open_ended].min())
                if self.sizes[node] < self.upper[node]:
                    arcs[hub] = self.subsidies[node]
            better = ~settled & (arcs < FAR) & (here + arcs < distance)
            distance[better], parent[better] = here + arcs[better], node
        shift = np.minimum(distance, here)
        self.subsidies += shift[:hub] - shift[hub]
        path = [node]
        while parent[path[-1]] >= 0:
            path.append(int(parent[path[-1]]))
        return path[::-1]

    def _push(self, path) -> bool:
        """One unit along a path of free arcs; whether another one can follow."""
        hub, arcs = self.hub, list(zip(path[:-1], path[1:], strict=True))
        moved = [(self.moves[a][b][0][1], b) for a, b in arcs if hub not in (a, b)]
        for a, b in arcs:
            if b == hub:
                self.sizes[a] += 1
            elif a == hub:
                self.sizes[b] -= 1
        for row, target in moved:
            self.counts[self.labels[row]] -= 1
            self.counts[target] += 1
            self.labels[row] = target
            for other in range(hub):
                if other != target:
                    delta = int(self.gaps[row, other] - self.gaps[row, target])
                    heapq.heappush(self.moves[target][other], (delta, row))
        for a in path:
            if a != hub:
                self.weight[a] = self._row(a)
        self.excess[path[0]] -= 1
        self.excess[path[-1]] += 1
        return self.excess[path[0]] > 0 and self.excess[path[-1]] < 0 and all(self._free(a, b) for a, b in arcs)

    def _free(self, a, b) -> bool:
        if b == self.hub:
            return self.sizes[a] < self.upper[a] and self.subsidies[a] == 0
        if a == self.hub:
            return self.sizes[b] > self.lower[b] and self.subsidies[b] == 0
        # as before the push, so below the floor as then
        return self.weight[a, b] + self.subsidies[a] == self.subsidies[b]
