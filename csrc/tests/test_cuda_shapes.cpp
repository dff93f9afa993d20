// The index maps of the CUDA kernels, gone through exhaustively: where packed weights lie, what a lane multiplies, how
// warps share a product, how a block's shared memory is divided, which banks a warp's loads meet.
#include <set>
#include <vector>

#include "../cuda/block_memory.h"
#include "check.h"

namespace {

using namespace dql;

Mlp mlp(int H, int L, int A, int S) {
    Mlp net = {};
    net.S = S, net.X = net.O = A, net.D = 16, net.H = H, net.L = L, net.networks = 1;
    return net;
}

template <class Test>
void each_tiling(Test test) {
    for (const Precision precision : {Precision::FP32, Precision::TF32, Precision::BF16}) {
        for (const int m_tiles : {1, 2, 4}) {
            for (const int cluster : {1, 2, 4, 8}) test(Tiling{precision, cluster, m_tiles, true});
            test(Tiling{precision, 1, m_tiles, false});
        }
    }
    test(Tiling{Precision::BF16, 1, WIDE_M_TILES, false});
}

const int WIDTHS[] = {1, 16, 17, 64, 100, 128, 200, 256, 500, 512};

bool possible(int H, const Tiling& tiling) { return tiling.m_tiles != WIDE_M_TILES || H <= 256; }

// Every number of every layer has a place of its own, and together they fill the block's operands.
void operands_are_a_permutation() {
    for (const int H : {1, 17, 64, 200, 256})
        each_tiling([&](const Tiling& tiling) {
            if (tiling.m_tiles == 2 || tiling.m_tiles == 4 || !possible(H, tiling)) return;  // the map does not look at it
            const Slices s(mlp(H, 3, 6, 17), tiling);
            std::vector<char> seen(s.operand_bytes() / s.element);
            for (int layer = 0; layer < s.L - 1; ++layer)
                for (int column = 0; column < s.NS; ++column)
                    for (int k = 0; k < s.HP; ++k) {
                        const int64_t at = operand_index(s, layer, column, k);
                        if (at < 0 || at >= static_cast<int64_t>(seen.size()) || seen[at]++) {
                            CHECK_EQ(at, -1);
                            return;
                        }
                    }
        });
}

// The 16 bytes that lane 4 g + t reads of a fragment are what the tensor core's lane wants: for one column, its quarter
// of the k-group, neighbours in k, the same quarter that it reads of a row of activations.
void a_lane_reads_its_own_numbers() {
    for (const int H : {64, 256})
        each_tiling([&](const Tiling& tiling) {
            if (tiling.m_tiles != 1) return;
            const Slices s(mlp(H, 2, 6, 17), tiling);
            const int per_lane = 16 / s.element;
            for (int pair = 0; pair < s.pairs(); ++pair)
                for (int j = 0; j < 2; ++j)
                    for (int group = 0; group < s.groups; ++group)
                        for (int lane = 0; lane < 32; ++lane)
                            for (int e = 0; e < per_lane; ++e) {
                                const int g = lane / 4, t = lane % 4;
                                const int column = 16 * pair + output_column(j, g);
                                const int k = (group * 4 + t) * per_lane + e;
                                const int64_t fragment = static_cast<int64_t>(2 * pair + j) * s.groups + group;
                                const int64_t byte = fragment * FRAGMENT_BYTES + lane * 16 + e * s.element;
                                if (operand_index(s, 0, column, k) * s.element != byte) {
                                    CHECK_EQ(operand_index(s, 0, column, k) * s.element, byte);
                                    return;
                                }
                            }
        });
}

// Of both n-tiles' results lane 4 g + t has columns 2 t and 2 t + 1: together columns 4 t .. 4 t + 3 of the pair.
void results_are_neighbours() {
    for (int t = 0; t < 4; ++t)
        for (int j = 0; j < 2; ++j)
            for (int e = 0; e < 2; ++e) CHECK_EQ(output_column(j, 2 * t + e), 4 * t + 2 * j + e);
}

// Wide operands: row n of a chunk is the column that n-tile n / 8 of its pair has at n % 8, and so number n of its row is
// that k, since the next layer's input lies as the results do. Bytes are swizzled within the row, so that eight rows'
// pieces of one k meet eight different groups of banks.
void wide_operands_are_swizzled_rows() {
    const Tiling tiling = {Precision::BF16, 1, WIDE_M_TILES, false};
    for (const int H : {100, 256}) {
        const Slices s(mlp(H, 3, 6, 17), tiling);
        CHECK_EQ(s.HP, H <= 128 ? 128 : 256);
        for (int layer = 0; layer < 2; ++layer)
            for (int n = 0; n < s.HP; ++n) {
                const auto of = [](int i) { return i / 16 * 16 + output_column(i / 8 % 2, i % 8); };
                CHECK_EQ(wide_row(of(n)), n);
                for (int k = 0; k < s.HP; ++k) {
                    const int64_t chunk = layer * (s.HP / WIDE_CHUNK) + k / WIDE_CHUNK;
                    const int64_t byte = chunk * s.HP * 128 + n * 128 + ((k % 64 / 8) ^ (n % 8)) * 16 + k % 8 * 2;
                    if (operand_index(s, layer, of(n), of(k)) * 2 != byte) {
                        CHECK_EQ(operand_index(s, layer, of(n), of(k)) * 2, byte);
                        return;
                    }
                }
            }
    }
    for (int k = 0; k < WIDE_CHUNK; k += 8) {
        std::set<int> banks;
        for (int row = 0; row < 8; ++row) banks.insert(wide_place(row, k) / 16 % 8);
        CHECK_EQ(banks.size(), size_t{8});
    }
}

// Eight rows of 16 bytes that a matrix of results is stored in, all columns of it: no bank twice. So for x, whose quads
// of eight rows are stored at a time.
void wide_stores_meet_no_bank_twice() {
    for (int first = 0; first < 64; first += 8)
        for (int k = 0; k < WIDE_CHUNK; k += 8) {
            std::set<int> banks;
            for (int row = first; row < first + 8; ++row) banks.insert(wide_place(row, k) % 128 / 16);
            CHECK_EQ(banks.size(), size_t{8});
        }
}

// The first layer is a product wherever its input, its ring and all the rest fit; of the published sizes, but for states
// of 45 and more, with a chunk more on its way.
void wide_first_layers() {
    const auto memory_of = [](int S, int A, int H) {
        const Mlp net = mlp(H, 3, A, S);
        const Tiling tiling = {Precision::BF16, 1, WIDE_M_TILES, false};
        const BlockMemory memory(net, tiling);
        CHECK(memory.bytes <= WIDE_SHARED);
        CHECK_EQ(memory.first > 0, Slices(net, tiling).slabs > 0);
        CHECK_EQ(memory.first_layer() == FirstLayer::PRODUCT, memory.first > 0);
        return memory;
    };
    for (const int H : {100, 256}) {
        CHECK_EQ(memory_of(11, 3, H).first_layer() == FirstLayer::PRODUCT, true);
        CHECK_EQ(memory_of(17, 6, H).first_layer() == FirstLayer::PRODUCT, true);
        CHECK_EQ(memory_of(29, 8, H).first_layer() == FirstLayer::PRODUCT, true);  // two slabs
        CHECK_EQ(memory_of(17, 6, H).stages, WIDE_MOST_STAGES);
        CHECK_EQ(memory_of(60, 9, H).first_layer() == FirstLayer::PRODUCT, H == 100);
    }
    CHECK_EQ(memory_of(60, 9, 256).first_layer() == FirstLayer::IN_SHARED, true);
    CHECK_EQ(memory_of(60, 64, 256).first_layer() == FirstLayer::IN_L2, true);
    CHECK_EQ(memory_of(512, 6, 100).first_layer() == FirstLayer::PRODUCT, false);
    CHECK_EQ(Slices(mlp(256, 3, 6, 17), {Precision::BF16, 1, 4, false}).slabs, 0);
    Mlp critic = mlp(256, 3, 6, 17);
    critic.D = 0;
    CHECK_EQ(Slices(critic, {Precision::BF16, 1, WIDE_M_TILES, false}).slabs, 0);
}

// Every k-group of every pair is multiplied by exactly one warp, and the owners of results are as chain.h takes them.
void warps_share_a_product() {
    for (int pairs = 1; pairs <= 32; ++pairs)
        for (int groups = 1; groups <= 32; ++groups) {
            const Division d(pairs, groups);
            std::vector<int> done(pairs * groups);
            bool idle = false;
            for (int warp = 0; warp < WARPS; ++warp) {
                if (d.pair(warp, 0) >= pairs) idle = true;
                for (int pass = 0; pass < d.passes; ++pass) {
                    const int pair = d.pair(warp, pass);
                    if (pair >= pairs) continue;
                    for (int group = d.first_group(warp, groups); group < d.last_group(warp, groups); ++group)
                        ++done[pair * groups + group];
                }
            }
            for (const int times : done) CHECK_EQ(times, 1);
            CHECK_EQ(idle, d.idle);
            CHECK(d.split == 1 || d.passes == 1);
            CHECK(d.split == 1 || d.first_group(1, groups) > 0);  // no range is empty
        }
}

void shared_memory_is_divided() {
    for (const int H : WIDTHS)
        for (const int A : {1, 6, 24, 64})
            each_tiling([&](const Tiling& tiling) {
                if (!possible(H, tiling)) return;
                const Mlp net = mlp(H, 4, A, 17);
                const Slices s(net, tiling);
                const BlockMemory memory(net, tiling);
                const int M = 16 * tiling.m_tiles;
                CHECK(memory.narrow >= A && memory.narrow % 4 == 0);
                CHECK_EQ(memory.row_bytes % 128, 64);  // two rows of eight lanes' 16 bytes fall into different banks
                CHECK(memory.row_bytes >= s.HP * s.element);
                for (const int offset : {memory.h[0], memory.h[1], memory.weights, memory.floats, memory.sums, memory.v,
                                         memory.own, memory.peers})
                    CHECK_EQ(offset % 128, 0);
                const int slots = s.pairs() < WARPS ? s.pairs() : WARPS, parts = slots * M * memory.narrow * 4;
                if (s.wide) {
                    CHECK_EQ(memory.h[0] % 1024, 0);
                    CHECK_EQ(memory.first % 1024, 0);
                    CHECK_EQ(memory.weights % 1024, 0);
                    CHECK((memory.first > 0 ? memory.first : memory.v) - memory.h[0] >= M * s.HP * 2);
                    if (memory.first > 0) CHECK(memory.v - memory.first >= s.slabs * M * 128);
                    CHECK(memory.own - memory.v >= M * memory.narrow * 4);
                    CHECK(memory.time - memory.own >= M * memory.narrow * 4);
                    const int floats = s.floats() - (memory.first > 0 ? A * s.HP : 0);
                    const int after_time = memory.floats > 0 ? memory.floats : memory.weights;
                    if (memory.first > 0) CHECK(after_time - memory.time >= 2 * s.HP * 4 && memory.floats > 0);
                    if (memory.floats > 0) CHECK(memory.weights - memory.floats >= floats * 4);
                    CHECK(memory.stages == WIDE_STAGES || memory.stages == WIDE_MOST_STAGES);
                    CHECK(memory.bytes - memory.weights >= memory.stages * s.HP * 128);
                    CHECK(memory.bytes <= WIDE_SHARED || memory.first_layer() == FirstLayer::IN_L2);
                    CHECK(8 * memory.narrow * 4 <= 16 * WIDE_CHUNK * 2);  // a chunk's rows of a warp hold half its sums
                } else {
                    CHECK(memory.h[1] - memory.h[0] >= M * memory.row_bytes);
                    CHECK(memory.weights - memory.h[1] >= M * memory.row_bytes);
                    if (tiling.resident) CHECK(memory.floats - memory.weights >= s.operand_bytes());
                    const bool split = Division(s.pairs(), s.groups).split > 1;
                    const int sums = WARPS * tiling.m_tiles * 1024;
                    if (split || tiling.precision == Precision::FP32)
                        CHECK(memory.v - memory.sums >= memory.sums_apart + sums);
                    CHECK_EQ(memory.sums_apart, split && tiling.cluster > 1 ? sums : 0);  // warps' barriers alone order them
                    const int after_own = memory.parts >= 0 ? memory.parts : memory.peers;
                    CHECK(after_own - memory.own >= 3 * M * memory.narrow * 4);
                    if (memory.parts >= 0)
                        CHECK(memory.peers - memory.parts >= parts);
                    else
                        CHECK(parts <= M * memory.row_bytes);
                    CHECK(memory.bytes - memory.peers >= (tiling.cluster > 1 ? tiling.cluster : 0) * M * memory.narrow * 4);
                }
            });
}

// A quarter of a warp reads 128 bytes of activations at a time: rows 2 i and 2 i + 1, all 32 banks.
void loads_of_activations_meet_no_bank_twice() {
    for (const int H : WIDTHS)
        each_tiling([&](const Tiling& tiling) {
            if (!possible(H, tiling) || tiling.m_tiles == WIDE_M_TILES) return;
            const int row_bytes = Slices(mlp(H, 3, 6, 17), tiling).row_bytes();
            for (int phase = 0; phase < 4; ++phase) {
                std::set<int> banks;
                for (int lane = 8 * phase; lane < 8 * phase + 8; ++lane)
                    for (int word = 0; word < 4; ++word)
                        banks.insert((lane / 4 * row_bytes + lane % 4 * 16 + 4 * word) / 4 % 32);
                CHECK_EQ(banks.size(), size_t{32});
            }
        });
}

// What a solo block keeps: no part reaches into the next, and the published sizes in tiles of 8 rows fit an A100.
void a_solo_blocks_memory_is_divided() {
    for (const int H : {4, 16, 100, 128, 200, 256})
        for (const int L : {2, 3, 4})
            for (const int A : {1, 6, 24, 64})
                for (const int rows : {4, 8, 16, 24}) {
                    const Tiling tiling = {Precision::BF16, 1, 0, true, rows};
                    const Mlp net = mlp(H, L, A, 17);
                    const Slices s(net, tiling);
                    const BlockMemory memory(net, tiling);
                    const int HP = H <= 128 ? 128 : 256, height = rows < 8 ? 8 : rows, narrow = rounded_up(A, 4);
                    CHECK_EQ(s.HP, HP);
                    CHECK_EQ(memory.narrow, narrow);
                    for (int n = 0; n < 8; ++n)  // a row ends before the next one starts
                        CHECK(solo_row(n, memory.row_bytes) + HP * 2 <= solo_row(n + 1, memory.row_bytes));
                    CHECK(solo_row(7, memory.row_bytes) + HP * 2 <= 8 * memory.row_bytes);
                    const int made_of = SOLO_TABLE_STEPS * 3 * MAX_NARROW * 4, states = (32 * rows + rows) * 4;
                    CHECK_EQ(memory.h[1] - memory.h[0], height * memory.row_bytes);  // in one piece, for
                    CHECK(memory.weights - memory.h[0] >= made_of);                  // the time table's hidden numbers
                    CHECK(memory.weights - memory.h[0] >= states);                   // and a chunk of states
                    CHECK(memory.floats - memory.weights >= (L - 2) * HP * HP * 2);
                    CHECK(memory.table - memory.floats >= (2 * narrow + L - 1) * HP * 4);
                    CHECK(memory.v - memory.table >= SOLO_TABLE_STEPS * HP * 4);
                    CHECK(memory.own - memory.v >= rows * narrow * 4);
                    const int64_t after = memory.parts >= 0 ? memory.parts : memory.bytes;
                    CHECK(after - memory.own >= 3 * rows * narrow * 4);
                    const int parts = WARPS * rows * narrow * 4;
                    CHECK(memory.parts >= 0 ? memory.bytes - memory.parts >= parts : parts <= height * memory.row_bytes);
                }
    const Mlp published = mlp(256, 3, 6, 17);
    CHECK(BlockMemory(published, {Precision::BF16, 1, 0, true, 8}).bytes <= 163 * 1024);
    CHECK(BlockMemory(published, {Precision::BF16, 1, 0, true, 24}).bytes <= WIDE_SHARED);
    CHECK_EQ(Packed(published, {Precision::BF16, 1, 0, true, 8}, true, 37, 5).end, 0);
    CHECK_EQ(whole_tiles(37, {Precision::BF16, 1, 0, true, 24}), 48);
}

// A quarter of a warp reads 128 bytes of rows 2 i and 2 i + 1; a warp writes 32 bytes of every other row. All 32 banks.
void solo_rows_meet_no_bank_twice() {
    for (const int row_bytes : {128 * 2 + SOLO_PAD, 256 * 2 + SOLO_PAD}) {
        for (int i = 0; i < 4; ++i) {
            std::set<int> banks;
            for (int lane = 8 * i; lane < 8 * i + 8; ++lane)
                for (int word = 0; word < 4; ++word)
                    banks.insert((solo_row(lane / 4, row_bytes) + lane % 4 * 16 + 4 * word) / 4 % 32);
            CHECK_EQ(banks.size(), size_t{32});
        }
        for (int e = 0; e < 2; ++e) {
            std::set<int> banks;
            for (int lane = 0; lane < 32; ++lane)
                banks.insert((solo_row(2 * (lane % 4) + e, row_bytes) + lane / 4 * 4) / 4 % 32);
            CHECK_EQ(banks.size(), size_t{32});
        }
    }
}

void packed_parts_follow_each_other() {
    for (const int H : WIDTHS)
        each_tiling([&](const Tiling& tiling) {
            if (!possible(H, tiling)) return;
            Mlp net = mlp(H, 3, 6, 17);
            const Slices s(net, tiling);
            const Packed packed(net, tiling, true, 37, 5);
            CHECK_EQ(packed.first, 2 * tiling.cluster * s.operand_bytes());
            CHECK_EQ(packed.floats - packed.first, s.slabs * s.HP * 128);
            CHECK_EQ(packed.time_table - packed.floats, tiling.cluster * s.floats() * 4);
            CHECK_EQ(packed.state_part - packed.time_table, 5 * s.HP * 4);
            CHECK_EQ(packed.end - packed.state_part, s.slabs > 0 ? 0 : 37 * s.HP * 4);
            for (const int64_t offset : {packed.first, packed.floats, packed.time_table, packed.state_part})
                CHECK_EQ(offset % 16, 0);
            CHECK_EQ(s.operand_bytes() % 16, 0);
            CHECK_EQ(s.floats() * 4 % 16, 0);
            const int64_t RP = whole_tiles(37, tiling);
            CHECK(RP >= 37 && RP % (16 * tiling.m_tiles) == 0 && RP < 37 + 16 * tiling.m_tiles);
            const SavedPlaces saved(net, tiling, 1, RP, 5);
            CHECK_EQ(saved.slope - saved.h, int64_t{3} * 5 * RP * s.HP * s.element);
            CHECK_EQ(saved.raws - saved.xs, int64_t{5} * RP * 6 * 4);
        });
}

}  // namespace

int main() {
    RUN(operands_are_a_permutation);
    RUN(a_lane_reads_its_own_numbers);
    RUN(results_are_neighbours);
    RUN(wide_operands_are_swizzled_rows);
    RUN(wide_stores_meet_no_bank_twice);
    RUN(wide_first_layers);
    RUN(warps_share_a_product);
    RUN(shared_memory_is_divided);
    RUN(loads_of_activations_meet_no_bank_twice);
    RUN(a_solo_blocks_memory_is_divided);
    RUN(solo_rows_meet_no_bank_twice);
    RUN(packed_parts_follow_each_other);
    return check::report();
}
