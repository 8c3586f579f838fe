// sae_encode on the CPU: the largest of x W' + b per token, found tile by tile without keeping the products.
//
// Where the processor multiplies bfloat16 faster than floats, tokens and latents are rounded to it first. The products
// are then known up to a margin that the lengths of what was rounded off bound; what may be among the largest is
// computed again in fp32 from the tensors as they came. A token with too many such latents is done over in fp32.

#include <functional>
#include <vector>

#include "panels.h"
#include "registry.h"

namespace pysteer {

// What a token may keep, so far.
struct Candidates {
    float *upper, *lower;  // bounds of the value, equal where it is exact
    std::int32_t* index;
    std::int64_t count;
    float limit;  // below it nothing is kept; NaN at the start
    bool overflow;
};

// The latents of a panel.
struct PanelOf {
    const float *bias, *threshold, *sizes, *errors;
    std::int64_t count;
    std::int32_t first;
};

// Of one thread.
struct Scratch {
    BFloat16* rounded;
    float *floats, *lost;
};

namespace {

// Larger values have larger keys, NaN the largest; among equals the lowest index has.
inline std::uint64_t key_of(float value, std::int32_t index) {
    std::uint32_t bits = 0xffffffffu;
    if (value == value) {
        bits = bits_of(value + 0.0f);
        bits = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    }
    return std::uint64_t(bits) << 32 | (0xffffffffu - std::uint32_t(index));
}

inline float value_of(std::uint64_t key) {
    const std::uint32_t bits = std::uint32_t(key >> 32);
    if (bits == 0xffffffffu) return __builtin_nanf("");
    return float_of(bits & 0x80000000u ? bits & 0x7fffffffu : ~bits);
}

inline std::int32_t index_of(std::uint64_t key) { return std::int32_t(0xffffffffu - std::uint32_t(key)); }

// The `keep` largest keys, in any order.
inline void cut(std::vector<std::uint64_t>& keys, std::int64_t keep) {
    if (std::int64_t(keys.size()) <= keep) return;
    std::nth_element(keys.begin(), keys.begin() + (keep - 1), keys.end(), std::greater<>());
    keys.resize(keep);
}

}  // namespace

// Some tokens and the panels of some latents.
struct EncodeTile {
    bool pairs, screening;
    std::int64_t tokens, width, latents, first, panels, keep, room;
    float *float_tokens, *float_panels, *sizes, *errors;
    std::uint32_t *pair_tokens, *pair_panels;
    TokenNorm* norms;
    const float *bias, *threshold;
    Candidates* candidates;

    PanelOf panel(std::int64_t p, std::int64_t size) const {
        const std::int64_t at = first + p * size;
        return {bias + at,         threshold ? threshold + at : nullptr, sizes + p * size,
                errors + p * size, std::min(size, latents - at),         std::int32_t(at)};
    }

    // Bounds twice the rounding of a sum of `width` products, as a share of the lengths.
    float share() const { return float(width + 32) * 0x1p-22f; }

    // Raises the limit to the last value that is kept for certain and drops what is below.
    void shrink(Candidates& mine) const {
        if (screening) {
            narrow(mine);
            mine.overflow = mine.overflow || mine.count > room;
            if (mine.overflow) mine.count = 0;  // will be done over
        } else {
            static thread_local std::vector<std::uint64_t> keys;
            keys.clear();
            for (std::int64_t i = 0; i < mine.count; ++i) keys.push_back(key_of(mine.upper[i], mine.index[i]));
            cut(keys, keep);
            mine.count = std::int64_t(keys.size());
            for (std::int64_t i = 0; i < mine.count; ++i) {
                mine.upper[i] = mine.lower[i] = value_of(keys[i]);
                mine.index[i] = index_of(keys[i]);
            }
            if (mine.count == keep) set_limit(mine, value_of(*std::min_element(keys.begin(), keys.end())));
        }
    }

    void narrow(Candidates& mine) const {
        if (mine.count < keep) return;
        static thread_local std::vector<float> lower;
        lower.assign(mine.lower, mine.lower + mine.count);
        for (float& each : lower) each = each == each ? each : __builtin_inff();
        std::nth_element(lower.begin(), lower.begin() + (keep - 1), lower.end(), std::greater<>());
        set_limit(mine, lower[keep - 1]);
        std::int64_t kept = 0;
        for (std::int64_t i = 0; i < mine.count; ++i) {
            if (mine.upper[i] < mine.limit) continue;
            mine.upper[kept] = mine.upper[i];
            mine.lower[kept] = mine.lower[i];
            mine.index[kept++] = mine.index[i];
        }
        mine.count = kept;
    }

    static void set_limit(Candidates& mine, float limit) {
        if (limit != limit) limit = __builtin_inff();
        if (!(mine.limit >= limit)) mine.limit = limit;
    }
};

}  // namespace pysteer

#define PYSTEER_KERNEL "sae_encode.simd.h"
#include "each_isa.h"

namespace py = pybind11;

namespace pysteer {
namespace {

constexpr std::int64_t kPanelsAtOnce = 16;
constexpr std::int64_t kChunk = 64;    // tokens that a thread takes at once
constexpr std::int64_t kWidest = 48;   // of all panels
constexpr std::int64_t kWorthIt = 64;  // latents per kept one from which screening pays

enum class Form { floats, pairs, screening };

struct Encode {
    TokenFrame tokens;
    LatentFrame latents;
    const float *pre_bias, *bias, *threshold;
    std::int64_t keep;
    bool relu;
    DType out;
    void* values;
    std::int32_t* indices;
    int threads;
};

template <class V>
void write(const std::vector<std::uint64_t>& keys, std::int64_t keep, bool relu, V* values, std::int32_t* indices) {
    for (std::int64_t i = 0; i < keep; ++i) {
        const bool there = i < std::int64_t(keys.size());
        const float value = there ? value_of(keys[i]) : 0.0f;
        values[i] = from_float<V>(relu && value < 0.0f ? 0.0f : value);
        indices[i] = there ? index_of(keys[i]) : -1;
    }
}

// Memory for some tokens, and the tile that describes it.
struct Workspace {
    std::int64_t block, panel, blocks, capacity;
    Buffer<float> float_tokens, float_panels, sizes, errors, bounds;
    Buffer<std::uint32_t> pair_tokens, pair_panels;
    Buffer<TokenNorm> norms;
    Buffer<std::int32_t> index;
    std::vector<Candidates> candidates;
    EncodeTile tile{};

    Workspace(const Encode& op, std::int64_t tokens, Form form)
        : block(PYSTEER_PICK(block_size)()), panel(PYSTEER_PICK(panel_size)()), blocks(ceil_div(tokens, block)) {
        const std::int64_t width = op.latents.width, pairs = (width + 1) / 2, widest = kPanelsAtOnce * panel;
        const bool packed = form != Form::floats;
        const std::int64_t floats = packed ? 0 : width, both = packed ? pairs : 0;
        tile.room = std::max<std::int64_t>((form == Form::screening ? 6 : 3) * op.keep, 192);
        capacity = tile.room + kWidest + 16;
        float_tokens = Buffer<float>(blocks * block * floats);
        float_panels = Buffer<float>(widest * floats);
        pair_tokens = Buffer<std::uint32_t>(blocks * block * both);
        pair_panels = Buffer<std::uint32_t>(widest * both);
        norms = Buffer<TokenNorm>(blocks * block);
        sizes = Buffer<float>(widest);
        errors = Buffer<float>(widest);
        bounds = Buffer<float>(2 * tokens * capacity);
        index = Buffer<std::int32_t>(tokens * capacity);
        candidates.resize(tokens);
        tile.pairs = packed;
        tile.screening = form == Form::screening;
        tile.width = width;
        tile.latents = op.latents.latents;
        tile.keep = op.keep;
        tile.float_tokens = float_tokens.get();
        tile.float_panels = float_panels.get();
        tile.pair_tokens = pair_tokens.get();
        tile.pair_panels = pair_panels.get();
        tile.sizes = sizes.get();
        tile.errors = errors.get();
        tile.norms = norms.get();
        tile.bias = op.bias;
        tile.threshold = op.threshold;
        tile.candidates = candidates.data();
    }

    void start(std::int64_t tokens) {
        tile.tokens = tokens;
        for (std::int64_t t = 0; t < tokens; ++t) {
            float* mine = bounds.get() + 2 * t * capacity;
            candidates[t] = {mine, mine + capacity, index.get() + t * capacity, 0, __builtin_nanf(""), false};
        }
    }
};

struct ThreadMemory {
    Buffer<BFloat16> rounded;
    Buffer<float> floats, lost;

    ThreadMemory(std::int64_t width, bool packed)
        : rounded(packed ? kWidest * (width + 2) : 0), floats(8 * width), lost(packed ? width : 0) {}

    Scratch scratch() const { return {rounded.get(), floats.get(), lost.get()}; }
};

// The result of one token from its candidates; false where there were too many.
template <class T, class W>
bool finish(const Encode& op, const EncodeTile& tile, Candidates& mine, const T* x, const W* w, std::int64_t n,
            float* floats) {
    if (mine.overflow) return false;
    static thread_local std::vector<std::uint64_t> keys;
    keys.clear();
    if (tile.screening) {
        tile.narrow(mine);
        const auto dot = PYSTEER_PICK(dot_latent<W>);
        PYSTEER_PICK(token_floats<T>)(x, op.tokens.channel_stride, op.pre_bias, tile.width, floats);
        for (std::int64_t i = 0; i < mine.count; ++i) {
            const std::int32_t j = mine.index[i];
            const float a = dot(floats, w + j * op.latents.latent_stride, tile.width) + op.bias[j];
            if (!op.threshold || a > op.threshold[j]) keys.push_back(key_of(a, j));
        }
    } else {
        for (std::int64_t i = 0; i < mine.count; ++i) keys.push_back(key_of(mine.upper[i], mine.index[i]));
    }
    cut(keys, op.keep);
    std::sort(keys.begin(), keys.end(), std::greater<>());
    std::int32_t* indices = op.indices + n * op.keep;
    const std::int64_t at = n * op.keep;
    if (op.out == DType::float32) write(keys, op.keep, op.relu, static_cast<float*>(op.values) + at, indices);
    if (op.out == DType::bfloat16) write(keys, op.keep, op.relu, static_cast<BFloat16*>(op.values) + at, indices);
    if (op.out == DType::float16) write(keys, op.keep, op.relu, static_cast<Float16*>(op.values) + at, indices);
    return true;
}

// Tokens `ids` of a tile; returns those that have to be done over.
template <class T, class W>
std::vector<std::int64_t> encode_tile(const Encode& op, const std::vector<std::int64_t>& ids, const T* x, const W* w,
                                      Workspace& space) {
    EncodeTile& tile = space.tile;
    const std::int64_t count = std::int64_t(ids.size()), blocks = ceil_div(count, space.block);
    const std::int64_t chunk = std::clamp(count / op.threads / space.block, std::int64_t(1), kChunk / space.block);
    const std::int64_t step = kPanelsAtOnce * space.panel, width = op.latents.width;
    std::vector<const T*> tokens(count);
    for (std::int64_t t = 0; t < count; ++t) tokens[t] = x + op.tokens.offset(ids[t]);
    std::vector<char> done(count);
    space.start(count);
#pragma omp parallel num_threads(op.threads) if (op.threads > 1)
    {
        const ThreadMemory memory(width, tile.pairs);
        Scratch scratch = memory.scratch();
#pragma omp for schedule(static)
        for (std::int64_t b = 0; b < blocks; ++b) {
            PYSTEER_PICK(pack_tokens<T>)
            (tokens.data(), op.tokens.channel_stride, op.pre_bias, tile, b, scratch.floats, scratch);
        }
        for (std::int64_t first = 0; first < op.latents.latents; first += step) {
#pragma omp single
            {
                tile.first = first;
                tile.panels = ceil_div(std::min(step, op.latents.latents - first), space.panel);
            }
#pragma omp for schedule(dynamic)
            for (std::int64_t p = 0; p < tile.panels; ++p) {
                PYSTEER_PICK(pack_latents<W>)(w, op.latents, tile, p, scratch);
            }
#pragma omp for schedule(dynamic)
            for (std::int64_t b = 0; b < blocks; b += chunk) {
                PYSTEER_PICK(encode_blocks)(tile, b, std::min(b + chunk, blocks));
            }
        }
#pragma omp for schedule(dynamic, 8)
        for (std::int64_t t = 0; t < count; ++t) {
            done[t] = finish(op, tile, space.candidates[t], tokens[t], w, ids[t], scratch.floats);
        }
    }
    std::vector<std::int64_t> left;
    for (std::int64_t t = 0; t < count; ++t) {
        if (!done[t]) left.push_back(ids[t]);
    }
    return left;
}

template <class T, class W>
void encode(const Encode& op, const T* x, const W* w) {
    const bool contiguous = op.latents.channel_stride == 1, has_pairs = PYSTEER_PICK(has_pairs)();
    const bool exact = std::is_same<T, BFloat16>::value && std::is_same<W, BFloat16>::value && !op.pre_bias;
    const bool pays = contiguous && op.latents.latents >= kWorthIt * op.keep;
    const Form form = !has_pairs || !(exact || pays) ? Form::floats : exact ? Form::pairs : Form::screening;
    const std::int64_t count = op.tokens.count(), step = token_tile(count, op.latents.width);
    std::vector<std::int64_t> left;
    {
        Workspace space(op, step, form);
        for (std::int64_t first = 0; first < count; first += step) {
            std::vector<std::int64_t> ids(std::min(step, count - first));
            for (std::size_t t = 0; t < ids.size(); ++t) ids[t] = first + std::int64_t(t);
            for (const std::int64_t n : encode_tile(op, ids, x, w, space)) left.push_back(n);
        }
    }
    if (left.empty()) return;
    const std::int64_t rest = std::int64_t(left.size()), few = std::min(step, rest);
    Workspace space(op, few, Form::floats);
    for (std::int64_t first = 0; first < rest; first += few) {
        encode_tile(op, {left.begin() + first, left.begin() + std::min(first + few, rest)}, x, w, space);
    }
}

template <class T>
void encode(const Encode& op, const T* x, std::uintptr_t weight, DType type) {
    if (type == DType::float32) encode(op, x, reinterpret_cast<const float*>(weight));
    if (type == DType::bfloat16) encode(op, x, reinterpret_cast<const BFloat16*>(weight));
    if (type == DType::float16) encode(op, x, reinterpret_cast<const Float16*>(weight));
}

// `bias` and `threshold` (null: none) have room for kWidest more floats than there are latents.
void sae_encode(std::uintptr_t x, std::uintptr_t weight, std::uintptr_t bias, std::uintptr_t pre_bias,
                std::uintptr_t threshold, std::uintptr_t values, std::uintptr_t indices, std::int64_t rows,
                std::int64_t tokens, std::int64_t width, std::int64_t x_row, std::int64_t x_token,
                std::int64_t x_channel, std::int64_t latents, std::int64_t w_latent, std::int64_t w_channel,
                std::int64_t keep, bool relu, std::int64_t x_type, std::int64_t w_type, std::int64_t out_type,
                std::int64_t threads) {
    const py::gil_scoped_release release;
    Encode op;
    op.tokens = {rows, tokens, width, x_row, x_token, x_channel};
    op.latents = {latents, width, w_latent, w_channel};
    op.bias = reinterpret_cast<const float*>(bias);
    op.pre_bias = reinterpret_cast<const float*>(pre_bias);
    op.threshold = reinterpret_cast<const float*>(threshold);
    op.keep = keep;
    op.relu = relu;
    op.out = DType(out_type);
    op.values = reinterpret_cast<void*>(values);
    op.indices = reinterpret_cast<std::int32_t*>(indices);
    op.threads = threads_for_products(rows * tokens * latents * width, threads);
    const DType type = DType(w_type);
    if (DType(x_type) == DType::float32) encode(op, reinterpret_cast<const float*>(x), weight, type);
    if (DType(x_type) == DType::bfloat16) encode(op, reinterpret_cast<const BFloat16*>(x), weight, type);
    if (DType(x_type) == DType::float16) encode(op, reinterpret_cast<const Float16*>(x), weight, type);
}

void register_sae_encode(py::module_& m) {
    m.attr("PANEL_ROOM") = kWidest;
    m.def("sae_encode", &sae_encode, "The largest pre-activations of every token, on the CPU.");
}

PYSTEER_REGISTER_OP(register_sae_encode)

}  // namespace
}  // namespace pysteer
