// Successive shortest paths on the graph of K clusters and a hub: the exact finish of the size-constrained assignment.
//
// The contract, the tie rules and the invariants are those of rsfast/kmeans/constraint/paths.py, the same in NumPy;
// both give the same labels, counts and subsidies, bit for bit. Integers throughout, so nothing is rounded.

#include "constraint.h"

#include <algorithm>
#include <functional>
#include <new>
#include <utility>
#include <vector>

namespace {

constexpr int64_t FAR = int64_t(1) << 62;  // no arc; every real distance is below

using Move = std::pair<int64_t, int64_t>;  // cost, row: the order of the heaps

class Graph {
 public:
  Graph(int64_t clusters, int64_t points, int64_t reach, const int64_t* lower, const int64_t* upper,
        const int64_t* gaps, int64_t* counts, int64_t* subsidies, int64_t* labels)
      : hub_(clusters), lower_(lower), upper_(upper), gaps_(gaps), counts_(counts), subsidies_(subsidies),
        labels_(labels), sizes_(clusters), excess_(clusters + 1), moves_(clusters * clusters),
        weight_(clusters * clusters), floor_(clusters * clusters, FAR), distance_(clusters + 1),
        parent_(clusters + 1), settled_(clusters + 1) {
    int64_t total = 0;
    for (int64_t k = 0; k < hub_; ++k) {
      sizes_[k] = subsidies[k] > 0   ? lower[k]
                  : subsidies[k] < 0 ? upper[k]
                                     : std::min(std::max(counts[k], lower[k]), upper[k]);
      excess_[k] = counts[k] - sizes_[k];
      total -= excess_[k];
    }
    excess_[hub_] = total;
    if (reach < FAR)  // what the lists leave out costs at least this much
      for (int64_t a = 0; a < hub_; ++a)
        for (int64_t b = 0; b < hub_; ++b) floor_[a * hub_ + b] = reach + 1 + subsidies[b] - subsidies[a];
    for (int64_t row = 0; row < points; ++row) {
      const int64_t a = labels[row], *gap = gaps + row * hub_, own = gap[a] - subsidies[a];
      for (int64_t b = 0; b < hub_; ++b)
        if (b != a && gap[b] - subsidies[b] - own <= reach) moves_[a * hub_ + b].push_back({gap[b] - gap[a], row});
    }
    for (auto& heap : moves_) std::make_heap(heap.begin(), heap.end(), std::greater<Move>());
    for (int64_t a = 0; a < hub_; ++a) refresh(a);
  }

  // Whether every size fits now; else the lists ran out.
  bool solve() {
    while (*std::max_element(excess_.begin(), excess_.end()) > 0) {
      if (!shortest()) return false;
      while (push()) {
      }
    }
    return true;
  }

 private:
  // Cost of the cheapest move from a to every cluster; points that have left a are dropped on the way.
  void refresh(int64_t a) {
    for (int64_t b = 0; b < hub_; ++b) {
      auto& heap = moves_[a * hub_ + b];
      while (!heap.empty() && labels_[heap.front().second] != a) {
        std::pop_heap(heap.begin(), heap.end(), std::greater<Move>());
        heap.pop_back();
      }
      weight_[a * hub_ + b] = heap.empty() ? FAR : heap.front().first;
    }
  }

  void reach_node(int64_t from, int64_t to, int64_t arc) {
    if (!settled_[to] && distance_[from] + arc < distance_[to]) {
      distance_[to] = distance_[from] + arc;
      parent_[to] = from;
    }
  }

  // Path from a node with too much to the nearest with too little, and subsidies that make all its arcs free.
  bool shortest() {
    for (int64_t v = 0; v <= hub_; ++v) distance_[v] = excess_[v] > 0 ? 0 : FAR;
    std::fill(parent_.begin(), parent_.end(), -1);
    std::fill(settled_.begin(), settled_.end(), 0);
    int64_t unknown = FAR, node;
    for (;;) {
      node = -1;
      for (int64_t v = 0; v <= hub_; ++v)
        if (!settled_[v] && (node < 0 || distance_[v] < distance_[node])) node = v;
      if (node < 0 || distance_[node] >= unknown) return false;
      settled_[node] = 1;
      if (excess_[node] < 0) break;
      if (node == hub_) {
        for (int64_t k = 0; k < hub_; ++k)
          if (sizes_[k] > lower_[k]) reach_node(node, k, -subsidies_[k]);
        continue;
      }
      for (int64_t b = 0; b < hub_; ++b) {
        const int64_t weight = weight_[node * hub_ + b], floor = floor_[node * hub_ + b];
        const int64_t change = subsidies_[node] - subsidies_[b];
        if (weight < floor)
          reach_node(node, b, weight + change);
        else if (counts_[node] && !settled_[b] && floor < FAR)
          unknown = std::min(unknown, distance_[node] + floor + change);
      }
      if (sizes_[node] < upper_[node]) reach_node(node, hub_, subsidies_[node]);
    }
    const int64_t end = distance_[node], shift = std::min(distance_[hub_], end);
    for (int64_t k = 0; k < hub_; ++k) subsidies_[k] += std::min(distance_[k], end) - shift;
    path_.clear();
    for (int64_t v = node; v >= 0; v = parent_[v]) path_.push_back(v);
    std::reverse(path_.begin(), path_.end());
    return true;
  }

  // One unit along a path of free arcs; whether another one can follow.
  bool push() {
    moved_.clear();
    for (size_t e = 0; e + 1 < path_.size(); ++e) {
      const int64_t a = path_[e], b = path_[e + 1];
      if (b == hub_)
        sizes_[a] += 1;
      else if (a == hub_)
        sizes_[b] -= 1;
      else
        moved_.push_back({moves_[a * hub_ + b].front().second, b});
    }
    for (auto [row, b] : moved_) {
      counts_[labels_[row]] -= 1;
      counts_[b] += 1;
      labels_[row] = b;
      const int64_t* gap = gaps_ + row * hub_;
      for (int64_t c = 0; c < hub_; ++c) {
        if (c == b) continue;
        auto& heap = moves_[b * hub_ + c];
        heap.push_back({gap[c] - gap[b], row});
        std::push_heap(heap.begin(), heap.end(), std::greater<Move>());
      }
    }
    for (int64_t v : path_)
      if (v != hub_) refresh(v);
    const bool more = --excess_[path_.front()] > 0;
    if (++excess_[path_.back()] >= 0 || !more) return false;
    for (size_t e = 0; e + 1 < path_.size(); ++e)
      if (!free(path_[e], path_[e + 1])) return false;
    return true;
  }

  bool free(int64_t a, int64_t b) const {
    if (b == hub_) return sizes_[a] < upper_[a] && subsidies_[a] == 0;
    if (a == hub_) return sizes_[b] > lower_[b] && subsidies_[b] == 0;
    return weight_[a * hub_ + b] + subsidies_[a] == subsidies_[b];  // as before the push, so below the floor as then
  }

  const int64_t hub_, *lower_, *upper_, *gaps_;
  int64_t *counts_, *subsidies_, *labels_;
  std::vector<int64_t> sizes_, excess_;
  std::vector<std::vector<Move>> moves_;  // of every ordered pair, a heap of the points that may move
  std::vector<int64_t> weight_, floor_, distance_, parent_;
  std::vector<char> settled_;
  std::vector<int64_t> path_;
  std::vector<Move> moved_;  // row, new cluster
};

}  // namespace

int rsf_shortest_paths(int64_t clusters, int64_t points, int64_t reach, const int64_t* lower, const int64_t* upper,
                       const int64_t* gaps, int64_t* counts, int64_t* subsidies, int64_t* labels, int32_t* ran_out) {
  if (clusters < 1 || points < 0 || reach < 0) return RSF_OUT_OF_RANGE;
  for (int64_t row = 0; row < points; ++row)
    if (labels[row] < 0 || labels[row] >= clusters) return RSF_OUT_OF_RANGE;
  try {
    *ran_out = !Graph(clusters, points, reach, lower, upper, gaps, counts, subsidies, labels).solve();
    return 0;
  } catch (const std::bad_alloc&) {  // must not cross the C boundary
    return RSF_NO_MEMORY;
  }
}
