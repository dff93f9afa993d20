// Rows cut into tiles, and the memory of what a forward pass saves: what the calls of engine.h share.
#pragma once

#include <algorithm>

#include "engine.h"
#include "pool.h"

namespace dql {

// The calling thread's scratch, 64-byte aligned, kept until the thread ends.
float* scratch(int64_t floats);

constexpr int64_t FEW_ROWS_OF_TILE = 4;  // not worth a thread of their own: the weights stream by once a tile

// Runs body(first_row, rows, scratch) over all rows. Results do not depend on how they are cut.
template <class Body>
void over_tiles(int threads, int64_t rows, int64_t scratch_floats, const Body& body) {
    const int64_t most = kernels().max_rows;
    int64_t tiles = (rows + most - 1) / most;
    if (threads > 1 && tiles < 8 * threads)  // a whole number of tiles for every thread
        tiles = std::min((tiles + threads - 1) / threads * threads, std::max(tiles, rows / FEW_ROWS_OF_TILE));
    if (tiles < 1) return;
    const int64_t each = rows / tiles, more = rows % tiles;
    // All threads' scratch is the caller's: there is nobody to tell a worker's failure to.
    const int64_t floats = (scratch_floats + 15) / 16 * 16;
    float* const memory = scratch(floats * std::max(threads, 1));
    parallel_for(threads, tiles, [&](int64_t tile, int worker) {
        const int64_t first = tile * each + std::min(tile, more);
        body(first, static_cast<int>(each + (tile < more)), memory + worker * floats);
    });
}

// Floats that `saved_in` lays out.
int64_t saved_floats(const Trunk& t, int64_t rows, int64_t inside_rows);
Saved saved_in(float* at, const Trunk& t, int64_t rows, int64_t inside_rows);

}  // namespace dql
