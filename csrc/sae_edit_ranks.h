// The ranks of edited latents among all, for the gate "topk"; part of sae_edit.cpp.
//
// Tokens are ranked against ever more latents and stay as long as one of their edits may still be among the first k.
// Many tokens are screened as in sae_encode.cpp: their products are known up to a margin, and latents within the margin
// of the edited one are multiplied exactly. Few tokens take exact products throughout, and so do, in the end, tokens
// with so many doubtful latents that screening is in vain. Ranks are exact on every way.
#pragma once

#include <numeric>
#include <vector>

#include "panels.h"

namespace pysteer {
namespace {

// Scores of all tokens and how many latents come before each of them; rank k means k or more.
struct Ranks {
    std::vector<float> score;
    std::vector<std::int32_t> before;
};

enum class Way : std::uint8_t { pairs, floats, dots };

// Tokens on one way, and what the ranking of some latents adds to them.
struct RankTile {
    std::int64_t width, edits;
    std::vector<float> floats, scores;
    std::vector<std::int32_t> own, before, doubts;

    RankTile(std::int64_t count, std::int64_t width, std::int64_t edits)
        : width(width),
          edits(edits),
          floats(count * width),
          scores(count * edits),
          own(count * edits),
          before(count * edits),
          doubts(count) {}

    RankedTokens tokens(std::int64_t count) const {
        return {count, width, edits, floats.data(), scores.data(), own.data()};
    }
};

// Whether edit e of a token may still be among the first k.
inline bool undecided(const SaeEdit& op, const Ranks& ranks, std::int64_t token, std::int64_t e) {
    const std::int64_t i = token * op.edits + e;
    return ranks.before[i] < op.k && op.is_open(op.rows[token / op.frame.tokens], e, ranks.score[i]);
}

// Brings token `token` to place t of the tile. What is decided scores infinity, which nothing comes before.
template <class T>
void seat(const T* x, const SaeEdit& op, const Ranks& ranks, std::int64_t token, std::int64_t t, RankTile& tile) {
    const Frame& f = op.frame;
    const std::int64_t r = token / f.tokens;
    PYSTEER_PICK(gather_token<T>)
    (x + r * f.x_row + token % f.tokens * f.x_token, f.x_channel, f.width, tile.floats.data() + t * f.width);
    for (std::int64_t e = 0; e < op.edits; ++e) {
        const bool open = undecided(op, ranks, token, e);
        tile.scores[t * op.edits + e] = open ? ranks.score[token * op.edits + e] : __builtin_inff();
        tile.own[t * op.edits + e] = op.latent_of(op.rows[r])[e];
        tile.before[t * op.edits + e] = 0;
    }
    tile.doubts[t] = 0;
}

// Adds `from`, which one thread counted, to what all have.
inline void add_counts(const std::vector<std::int32_t>& from, std::vector<std::int32_t>& to) {
    for (std::size_t i = 0; i < from.size(); ++i) to[i] += from[i];
}

template <class W>
void rank_tile_by_dots(const SaeEdit& op, std::int64_t count, std::int64_t begin, std::int64_t end, RankTile& tile) {
    constexpr std::int64_t kTokens = 48, kLatents = 256;
    const RankedTokens all = tile.tokens(count);
    const std::int64_t groups = ceil_div(count, kTokens), parts = ceil_div(end - begin, kLatents);
#pragma omp parallel num_threads(op.threads) if (op.threads > 1)
    {
        std::vector<std::int32_t> before(tile.before.size());
#pragma omp for schedule(dynamic) nowait
        for (std::int64_t i = 0; i < groups * parts; ++i) {
            const std::int64_t first = begin + i % parts * kLatents, group = i / parts * kTokens;
            const RankedTokens some = all.from(group, std::min(kTokens, count - group));
            PYSTEER_PICK(rank_by_all_dots<W>)
            (reinterpret_cast<const W*>(op.full.weight), {op.full.latents, op.frame.width, op.full.stride}, first,
             std::min(first + kLatents, end), op.full.bias, some, before.data() + group * op.edits);
        }
#pragma omp critical
        add_counts(before, tile.before);
    }
}

template <class W>
void screen_tile(const SaeEdit& op, bool pairs, std::int64_t count, std::int64_t begin, std::int64_t end,
                 RankTile& tile) {
    const std::int64_t width = op.frame.width, block = PYSTEER_PICK(block_size)(), panel = PYSTEER_PICK(panel_size)();
    const TokenBuffers buffers(count, width, pairs);
    const PackedTokens packed = buffers.tokens(count);
    const RankedTokens tokens = tile.tokens(count);
    std::vector<const float*> rows(count);
    for (std::int64_t t = 0; t < count; ++t) rows[t] = tokens.floats + t * width;
#pragma omp parallel num_threads(op.threads) if (op.threads > 1)
    {
        const PanelBuffers own(width, pairs);
        const PanelMemory memory = own.memory();
        std::vector<std::int32_t> before(tile.before.size()), doubts(tile.doubts.size());
#pragma omp for schedule(static)
        for (std::int64_t b = 0; b < ceil_div(count, block); ++b) {
            PYSTEER_PICK(pack_tokens<float>)(rows.data(), 1, nullptr, width, packed, b, memory);
        }
#pragma omp for schedule(dynamic) nowait
        for (std::int64_t first = begin; first < end; first += panel) {
            PYSTEER_PICK(rank_panel<W>)
            (reinterpret_cast<const W*>(op.full.weight), {end, width, op.full.stride}, first, op.full.bias, tokens,
             packed, memory, before.data(), doubts.data());
        }
#pragma omp critical
        {
            add_counts(before, tile.before);
            add_counts(doubts, tile.doubts);
        }
    }
}

// Ranks the tokens in `left`, all on the same way, against the latents [begin, end); where screening one of them is in
// vain, it goes another way from now on.
template <class T, class W>
void rank_against(const T* x, const SaeEdit& op, const std::vector<std::int64_t>& left, Way way, std::int64_t begin,
                  std::int64_t end, Ranks& ranks, std::vector<Way>& ways) {
    constexpr std::int64_t kFew = 8;  // packing the latents costs as much as their products with so many tokens
    const std::int64_t all = std::int64_t(left.size()), most = token_tile(all, op.frame.width);
    RankTile tile(most, op.frame.width, op.edits);
    for (std::int64_t start = 0; start < all; start += most) {
        const std::int64_t count = std::min(most, all - start), *token = left.data() + start;
#pragma omp parallel for num_threads(op.threads) if (op.threads > 1)
        for (std::int64_t t = 0; t < count; ++t) seat(x, op, ranks, token[t], t, tile);
        if (way == Way::dots || count < kFew) {
            rank_tile_by_dots<W>(op, count, begin, end, tile);
        } else {
            screen_tile<W>(op, way == Way::pairs, count, begin, end, tile);
        }
        for (std::int64_t t = 0; t < count; ++t) {
            for (std::int64_t e = 0; e < op.edits; ++e) {
                ranks.before[token[t] * op.edits + e] += tile.before[t * op.edits + e];
            }
            if (tile.doubts[t] * 8 > end - begin) ways[token[t]] = Way(std::uint8_t(way) + 1);
        }
    }
}

template <class T>
void rank_against(const T* x, const SaeEdit& op, const std::vector<std::int64_t>& left, Way way, std::int64_t begin,
                  std::int64_t end, Ranks& ranks, std::vector<Way>& ways) {
    if (left.empty()) return;
    if (op.full.type == DType::float32) rank_against<T, float>(x, op, left, way, begin, end, ranks, ways);
    if (op.full.type == DType::bfloat16) rank_against<T, BFloat16>(x, op, left, way, begin, end, ranks, ways);
    if (op.full.type == DType::float16) rank_against<T, Float16>(x, op, left, way, begin, end, ranks, ways);
}

// Ranks all tokens whose scores are known.
template <class T>
void rank(const T* x, const SaeEdit& op, Ranks& ranks) {
    const std::int64_t all = op.frame.rows * op.frame.tokens;
    std::vector<Way> ways(all, PYSTEER_PICK(has_pairs)() ? Way::pairs : Way::floats);
    std::vector<std::int64_t> left(all);
    std::iota(left.begin(), left.end(), 0);
    const auto decided = [&](std::int64_t token) {
        for (std::int64_t e = 0; e < op.edits; ++e) {
            if (undecided(op, ranks, token, e)) return false;
        }
        return true;
    };
    std::int64_t begin = 0, step = 480;  // whole panels of every instruction set
    while (begin < op.full.latents) {
        left.erase(std::remove_if(left.begin(), left.end(), decided), left.end());
        if (left.empty()) return;
        const std::int64_t end = std::min(begin + step, op.full.latents);
        std::vector<std::int64_t> on[3];
        for (const std::int64_t token : left) on[int(ways[token])].push_back(token);
        for (int way = 0; way < 3; ++way) rank_against(x, op, on[way], Way(way), begin, end, ranks, ways);
        begin = end;
        step *= 2;
    }
}

}  // namespace
}  // namespace pysteer
