// What the CPU kernels of the steering ops share: the steering table, the memory frame of the activation, the copy of
// what is left alone, and the split of the work over threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "cpu_features.h"
#include "dtype.h"
#include "element.h"

#ifdef PYSTEER_X86
#include <xmmintrin.h>
#endif
#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace pysteer {

enum Status : int { ok = 0, clock_outside = 1, slot_outside = 2 };

struct Table {
    const std::int32_t* slot;
    const float* strength;
    const std::int64_t* clock;
    const std::int32_t* span;  // null: all tokens
    std::int64_t sets, steps, capacity;
};

// From the addresses that bound functions are given.
inline Table table_at(std::uintptr_t slot, std::uintptr_t strength, std::uintptr_t clock, std::uintptr_t span,
                      std::int64_t sets, std::int64_t steps, std::int64_t capacity) {
    return {reinterpret_cast<const std::int32_t*>(slot),
            reinterpret_cast<const float*>(strength),
            reinterpret_cast<const std::int64_t*>(clock),
            reinterpret_cast<const std::int32_t*>(span),
            sets,
            steps,
            capacity};
}

struct Row {
    std::int64_t set = 0;
    float strength = 0.0f;
    std::int64_t start = 0, end = 0;  // tokens that are changed; none where the row is left alone
};

struct Frame {
    std::int64_t rows, tokens, width;
    std::int64_t x_row, x_token, x_channel;
    std::int64_t y_row, y_token, y_channel;

    bool by_token() const { return width == 1 || (x_channel == 1 && y_channel == 1); }
};

inline Status read_rows(const Table& table, const Frame& frame, std::vector<Row>& rows) {
    const std::int64_t step = *table.clock;
    if (step < 0 || step >= table.steps) return clock_outside;
    rows.resize(frame.rows);
    for (std::int64_t r = 0; r < frame.rows; ++r) {
        Row& row = rows[r];
        row.set = table.slot[step * table.capacity + r];
        row.strength = table.strength[step * table.capacity + r];
        if (row.set < 0 || row.set >= table.sets) return slot_outside;
        if (row.set == 0 || row.strength == 0.0f) continue;
        row.end = frame.tokens;
        if (table.span) {
            row.start = std::clamp<std::int64_t>(table.span[2 * r], 0, frame.tokens);
            row.end = std::clamp<std::int64_t>(table.span[2 * r + 1], row.start, frame.tokens);
        }
    }
    return ok;
}

// Tokens [begin, end) of a row, for channels next to each other.
template <class T>
void copy_tokens(const T* x, T* y, std::int64_t begin, std::int64_t end, const Frame& f) {
    if (static_cast<const void*>(x) == y || begin >= end) return;
    if (f.x_token == f.width && f.y_token == f.width) {
        std::memcpy(y + begin * f.width, x + begin * f.width, (end - begin) * f.width * sizeof(T));
        return;
    }
    for (std::int64_t t = begin; t < end; ++t) std::memcpy(y + t * f.y_token, x + t * f.x_token, f.width * sizeof(T));
}

// The same for tokens next to each other.
template <class T>
void copy_channels(const T* x, T* y, std::int64_t begin, std::int64_t end, const Frame& f) {
    if (static_cast<const void*>(x) == y || begin >= end) return;
    for (std::int64_t d = 0; d < f.width; ++d) {
        std::memcpy(y + d * f.y_channel + begin, x + d * f.x_channel + begin, (end - begin) * sizeof(T));
    }
}

// Whether memory has been used before. The system clears a page when it is first touched, which leaves it in the cache.
inline bool was_touched(const void* p) {
#ifdef __linux__
    static const std::uintptr_t page = std::uintptr_t(sysconf(_SC_PAGESIZE));
    unsigned char resident = 1;
    void* start = reinterpret_cast<void*>(reinterpret_cast<std::uintptr_t>(p) / page * page);
    return mincore(start, 1, &resident) != 0 || (resident & 1);
#else
    return p != nullptr;
#endif
}

// A result that will not be found in the cache anyway is written past it, which saves reading it first. The limit is
// the last-level cache that the cores of one cluster share on common servers; what the system reports may be the sum
// over all clusters.
inline bool worth_streaming(const void* x, const void* y, std::int64_t bytes) {
    return x != y && 2 * bytes >= std::int64_t(32) << 20 && was_touched(static_cast<const char*>(y) + bytes / 2);
}

// Every thread that wrote past the caches ends with this, before others look at the result.
inline void finish_streams() {
#ifdef PYSTEER_X86
    _mm_sfence();
#endif
}

// Threads for work that reads `bytes`: waking one costs some microseconds.
inline int threads_for(std::int64_t bytes, std::int64_t available) {
    return int(std::clamp<std::int64_t>(bytes >> 16, 1, std::max<std::int64_t>(available, 1)));
}

}  // namespace pysteer
