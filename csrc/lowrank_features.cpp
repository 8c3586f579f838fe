// What can be said of products of thin factors on the CPU without storing a product: their Gram matrices, from which
// norms and singular values follow, and order statistics of their elements.
//
// Rank 1: the products of one sign are counted by walking two sorted lists, and the answer is bisected. Any other rank:
// tiles of the product pass three times, and a histogram of eleven, eleven and ten bits finds the answer's bits.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "registry.h"

namespace pysteer {
namespace {

constexpr int kParts = 32;  // of a sum in fp64: its order does not depend on the instruction set

}  // namespace
}  // namespace pysteer

#define PYSTEER_KERNEL "lowrank_features.simd.h"
#include "each_isa.h"

namespace py = pybind11;

namespace pysteer {
namespace {

constexpr std::int64_t kColumns = 256;  // of a tile; a multiple of the longest pair of vectors
constexpr std::int64_t kBins = 2048;

float float_of_key(std::uint32_t key) { return float_of(key & 0x80000000u ? key & 0x7fffffffu : ~key); }

// The factors of one adapter, scale in `up`; the columns of `down` are padded with zeros to whole tiles.
struct Factors {
    std::vector<float> up, down;
    std::int64_t m, n, rank, padded;

    Factors(const float* u, const float* d, float scale, std::int64_t m, std::int64_t n, std::int64_t rank)
        : up(u, u + m * rank), m(m), n(n), rank(rank), padded((n + kColumns - 1) / kColumns * kColumns) {
        for (float& each : up) each *= scale;
        down.resize(rank * padded);
        for (std::int64_t k = 0; k < rank; ++k) std::copy_n(d + k * n, n, down.begin() + k * padded);
    }

    // Calls take(keys, count) for every piece of the product.
    template <class Take>
    void for_each_piece(Take take) const {
        const auto product = PYSTEER_PICK(product_keys);
        std::uint32_t keys[4 * kColumns];
        for (std::int64_t j = 0; j < n; j += kColumns) {
            const std::int64_t columns = std::min(kColumns, n - j);
            for (std::int64_t i = 0; i < m; i += 4) {
                const float* rows[4];
                for (int k = 0; k < 4; ++k) rows[k] = up.data() + std::min(i + k, m - 1) * rank;
                product(rows, down.data() + j, rank, padded, kColumns, keys);
                for (int k = 0; k < std::min<std::int64_t>(4, m - i); ++k) take(keys + k * kColumns, columns);
            }
        }
    }
};

// Which bits of the answers are known: the answers whose leading bits agree share a group; 0 stands for no answer.
struct Groups {
    std::vector<std::uint16_t> of_bin;  // [groups][kBins], the group that a bin leads to
    std::vector<std::uint32_t> counts;  // [groups][kBins]
    int groups;

    explicit Groups(int groups) : of_bin(groups * kBins), counts(groups * kBins), groups(groups) {}

    // Refines every rank: the group it is in becomes a new one with one more digit; ranks count within their group.
    int refine(std::vector<int>& group, std::vector<std::int64_t>& rank, std::vector<std::uint32_t>& key, int bits) {
        int found = 0;
        for (std::size_t q = 0; q < rank.size(); ++q) {
            const std::uint32_t* count = counts.data() + group[q] * kBins;
            std::int64_t bin = 0;
            while (rank[q] >= count[bin]) rank[q] -= count[bin++];
            std::uint16_t& next = of_bin[group[q] * kBins + bin];
            if (!next) next = std::uint16_t(++found);
            key[q] = key[q] << bits | std::uint32_t(bin);
            group[q] = next;
        }
        return found + 1;
    }
};

void by_histogram(const Factors& f, const std::int64_t* ranks, std::int64_t count, float* out) {
    std::vector<int> group(count, 0);
    std::vector<std::int64_t> rank(ranks, ranks + count);
    std::vector<std::uint32_t> key(count, 0);
    Groups first(1);
    f.for_each_piece([&](const std::uint32_t* keys, std::int64_t columns) {
        for (std::int64_t j = 0; j < columns; ++j) ++first.counts[keys[j] >> 21];
    });
    Groups second(first.refine(group, rank, key, 11));
    f.for_each_piece([&](const std::uint32_t* keys, std::int64_t columns) {
        for (std::int64_t j = 0; j < columns; ++j) {
            ++second.counts[first.of_bin[keys[j] >> 21] * kBins + (keys[j] >> 10 & 0x7ffu)];
        }
    });
    Groups third(second.refine(group, rank, key, 11));
    f.for_each_piece([&](const std::uint32_t* keys, std::int64_t columns) {
        for (std::int64_t j = 0; j < columns; ++j) {
            const std::int64_t from = first.of_bin[keys[j] >> 21] * kBins + (keys[j] >> 10 & 0x7ffu);
            const std::int64_t into = first.of_bin[keys[j] >> 21] ? second.of_bin[from] : 0;
            ++third.counts[into * kBins + (keys[j] & 0x3ffu)];
        }
    });
    third.refine(group, rank, key, 10);
    for (std::int64_t q = 0; q < count; ++q) out[q] = float_of_key(key[q]);
}

using Sizes = std::vector<float>;

// The sizes of the products of two pairs of sorted lists.
struct Products {
    const Sizes *u[2], *v[2];

    std::int64_t size() const { return std::int64_t(u[0]->size() * v[0]->size() + u[1]->size() * v[1]->size()); }

    std::int64_t count_up_to(float limit) const {
        std::int64_t count = 0;
        for (int side = 0; side < 2; ++side) {
            const Sizes& b = *v[side];
            std::size_t j = b.size();
            for (const float a : *u[side]) {
                while (j > 0 && a * b[j - 1] > limit) --j;
                if (!j) break;
                count += std::int64_t(j);
            }
        }
        return count;
    }

    // The one of this rank among all sizes in ascending order.
    float at(std::int64_t rank) const {
        std::uint32_t low = 0, high = 0x7f800000u;
        while (low < high) {
            const std::uint32_t middle = low + (high - low) / 2;
            if (count_up_to(float_of(middle)) > rank) {
                high = middle;
            } else {
                low = middle + 1;
            }
        }
        return float_of(low);
    }
};

void split(const float* x, std::int64_t size, Sizes (&signs)[2]) {
    for (std::int64_t i = 0; i < size; ++i) {
        if (x[i] != 0) signs[x[i] < 0].push_back(std::fabs(x[i]));
    }
    for (Sizes& each : signs) std::sort(each.begin(), each.end());
}

void by_counting(const Factors& f, const std::int64_t* ranks, std::int64_t count, float* out) {
    Sizes u[2], v[2];
    split(f.up.data(), f.m, u);
    split(f.down.data(), f.n, v);
    const Products positive{{&u[0], &u[1]}, {&v[0], &v[1]}}, negative{{&u[0], &u[1]}, {&v[1], &v[0]}};
    const std::int64_t below = negative.size(), above = f.m * f.n - positive.size();
    for (std::int64_t q = 0; q < count; ++q) {
        const std::int64_t rank = ranks[q];
        out[q] = rank < below ? -negative.at(below - 1 - rank) : rank < above ? 0.0f : positive.at(rank - above);
    }
}

bool finite(const std::vector<float>& x) {
    return std::all_of(x.begin(), x.end(), [](float each) { return std::isfinite(each); });
}

void lowrank_features(std::uintptr_t up, std::uintptr_t down, std::uintptr_t scale, std::uintptr_t ranks,
                      std::uintptr_t out, std::int64_t adapters, std::int64_t m, std::int64_t n, std::int64_t rank,
                      std::int64_t count, std::int64_t threads) {
    const py::gil_scoped_release release;
    const float* b = reinterpret_cast<const float*>(up);
    const float* a = reinterpret_cast<const float*>(down);
    const float* s = reinterpret_cast<const float*>(scale);
    const std::int64_t* wanted = reinterpret_cast<const std::int64_t*>(ranks);
    float* found = reinterpret_cast<float*>(out);
    const int team = int(std::clamp<std::int64_t>(adapters, 1, std::max<std::int64_t>(threads, 1)));
#pragma omp parallel for schedule(dynamic) num_threads(team) if (team > 1)
    for (std::int64_t i = 0; i < adapters; ++i) {
        const Factors factors(b + i * m * rank, a + i * rank * n, s[i], m, n, rank);
        const bool counting = rank == 1 && finite(factors.up) && finite(factors.down);
        (counting ? by_counting : by_histogram)(factors, wanted, count, found + i * count);
    }
}

// B'B [rank, rank], A A' and the sum of all elements of every product B A, in fp64.
void lowrank_grams(std::uintptr_t up, std::uintptr_t down, std::uintptr_t left, std::uintptr_t right,
                   std::uintptr_t total, std::int64_t adapters, std::int64_t m, std::int64_t n, std::int64_t rank,
                   std::int64_t threads) {
    const py::gil_scoped_release release;
    const float* b = reinterpret_cast<const float*>(up);
    const float* a = reinterpret_cast<const float*>(down);
    double *ours = reinterpret_cast<double*>(left), *theirs = reinterpret_cast<double*>(right);
    double* sums = reinterpret_cast<double*>(total);
    const auto padded = [](std::int64_t size) { return (size + kParts - 1) / kParts * kParts; };
    const std::int64_t rows = padded(m), columns = padded(n), work = adapters * (m + n) * rank * rank;
    const int team = int(std::clamp<std::int64_t>(work >> 18, 1, std::max<std::int64_t>(threads, 1)));
#pragma omp parallel num_threads(team) if (team > 1)
    {
        std::vector<double> wide(rank * std::max(rows, columns)), of_b(rank), of_a(rank);
#pragma omp for schedule(static)
        for (std::int64_t i = 0; i < adapters; ++i) {
            std::fill(wide.begin(), wide.end(), 0.0);
            for (std::int64_t row = 0; row < m; ++row) {
                for (std::int64_t k = 0; k < rank; ++k) wide[k * rows + row] = b[(i * m + row) * rank + k];
            }
            PYSTEER_PICK(gram_of)(wide.data(), rank, rows, ours + i * rank * rank, of_b.data());
            std::fill(wide.begin(), wide.end(), 0.0);
            for (std::int64_t k = 0; k < rank; ++k) {
                std::copy_n(a + (i * rank + k) * n, n, wide.begin() + k * columns);
            }
            PYSTEER_PICK(gram_of)(wide.data(), rank, columns, theirs + i * rank * rank, of_a.data());
            sums[i] = 0.0;
            for (std::int64_t k = 0; k < rank; ++k) sums[i] += of_b[k] * of_a[k];
        }
    }
}

void register_lowrank_features(py::module_& m) {
    m.def("lowrank_features", &lowrank_features,
          "Elements of products [m, n] of thin factors by their rank in ascending order, [adapters, count].");
    m.def("lowrank_grams", &lowrank_grams,
          "Gram matrices of thin factors and the sums of their products' elements, in fp64.");
}

PYSTEER_REGISTER_OP(register_lowrank_features)

}  // namespace
}  // namespace pysteer
