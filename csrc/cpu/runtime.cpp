// Which kernels run on this CPU, and the memory they work in.
#include <cstdlib>
#include <new>
#include <stdexcept>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "engine.h"

namespace dql {

#if DQL_HAVE_AVX512BF16
const Kernels* kernels_avx512bf16();
#endif
#if DQL_HAVE_AVX512
const Kernels* kernels_avx512();
#endif
#if DQL_HAVE_AVX2
const Kernels* kernels_avx2();
#endif
const Kernels* kernels_generic();

// ---- variants ----

static std::vector<Variant> find_variants() {
    std::vector<Variant> found;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    (void)avx512;
#if DQL_HAVE_AVX512BF16
    if (avx512 && __builtin_cpu_supports("avx512bf16"))
        found.push_back({"avx512bf16", kernels_avx512bf16(), ""});
    else
        found.push_back({"avx512bf16", nullptr, "this CPU has no AVX512_BF16"});
#endif
#if DQL_HAVE_AVX512
    if (avx512)
        found.push_back({"avx512", kernels_avx512(), ""});
    else
        found.push_back({"avx512", nullptr, "this CPU has no AVX-512 (F, BW, DQ and VL)"});
#endif
#if DQL_HAVE_AVX2
    if (avx2)
        found.push_back({"avx2", kernels_avx2(), ""});
    else
        found.push_back({"avx2", nullptr, "this CPU has no AVX2 with FMA"});
#endif
#endif
    found.push_back({"generic", kernels_generic(), ""});
    return found;
}

const std::vector<Variant>& variants() {
    static const std::vector<Variant> found = find_variants();
    return found;
}

static const Kernels* forced = nullptr;

const Kernels& kernels() {
    if (forced) return *forced;
    static const Kernels* const best = [] {
        for (const Variant& variant : variants())
            if (variant.kernels) return variant.kernels;
        return static_cast<const Kernels*>(nullptr);  // not reached: generic always runs
    }();
    return *best;
}

void force_variant(const std::string& name) {
    if (name.empty()) {
        forced = nullptr;
        return;
    }
    std::string known;
    for (const Variant& variant : variants()) {
        if (name == variant.name) {
            if (!variant.kernels) throw std::invalid_argument("variant " + name + " cannot run: " + variant.reason);
            forced = variant.kernels;
            return;
        }
        known += (known.empty() ? "" : ", ") + std::string(variant.name);
    }
    throw std::invalid_argument("unknown variant '" + name + "'; this build has: " + known);
}

// ---- memory ----

// Large buffers in pages of 2 MB, where the system has them: fewer faults and TLB misses, and neighbours in memory are
// neighbours in the L2 cache. With pages of 4 KB one row's chain took 14 to 17 us, as luck distributed them.
constexpr size_t HUGE_PAGE = size_t{2} << 20;
constexpr size_t LARGE = size_t{1} << 18;

// What a thread keeps of the large buffers that it freed.
struct Kept {
    static constexpr int BUFFERS = 4;
    static constexpr size_t BYTES = size_t{128} << 20;
    void* memory[BUFFERS] = {};
    size_t bytes[BUFFERS] = {};
    int next = 0;

    // The smallest that holds `needed` and is not far too large, or null.
    void* take(size_t& needed) {
        int best = -1;
        for (int i = 0; i < BUFFERS; ++i)
            if (memory[i] && bytes[i] >= needed && bytes[i] / 2 <= needed && (best < 0 || bytes[i] < bytes[best]))
                best = i;
        if (best < 0) return nullptr;
        needed = bytes[best];
        void* found = memory[best];
        memory[best] = nullptr;
        return found;
    }

    // The oldest makes room.
    bool keep(void* freed, size_t size) {
        if (size > BYTES) return false;
        const auto drop = [&](int i) {
            std::free(memory[i]);
            memory[i] = nullptr;
        };
        for (int i = 0; i < BUFFERS && total() + size > BYTES; ++i) drop((next + i) % BUFFERS);
        if (memory[next]) drop(next);
        memory[next] = freed;
        bytes[next] = size;
        next = (next + 1) % BUFFERS;
        return true;
    }

    size_t total() const {
        size_t sum = 0;
        for (int i = 0; i < BUFFERS; ++i) sum += memory[i] ? bytes[i] : 0;
        return sum;
    }

    ~Kept();
};

static thread_local bool kept_is_gone = false;  // buffers may be freed after it, while the thread ends
static thread_local Kept kept;

Kept::~Kept() {
    kept_is_gone = true;
    for (void* p : memory) std::free(p);
}

void Buffer::Free::operator()(float* p) const {
    if (bytes < LARGE || kept_is_gone || !kept.keep(p, bytes)) std::free(p);
}

Buffer::Buffer(int64_t floats) : size_(floats) {
    const size_t needed = static_cast<size_t>(floats > 0 ? floats : 1) * sizeof(float);
    const size_t alignment = needed >= LARGE ? HUGE_PAGE : 64;
    size_t bytes = (needed + alignment - 1) / alignment * alignment;
    void* memory = needed >= LARGE && !kept_is_gone ? kept.take(bytes) : nullptr;
    if (!memory) {
        memory = std::aligned_alloc(alignment, bytes);
        if (!memory) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
        if (alignment == HUGE_PAGE) madvise(memory, bytes, MADV_HUGEPAGE);  // a hint: its failure does not matter
#endif
    }
    memory_ = std::unique_ptr<float, Free>(static_cast<float*>(memory), Free{bytes});
}

float* scratch(int64_t floats) {
    thread_local Buffer buffer;
    if (buffer.size() < floats) {
        buffer = Buffer();
        buffer = Buffer(floats);
    }
    return buffer.data();
}

}  // namespace dql
