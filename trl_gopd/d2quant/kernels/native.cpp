// Products with a weight W of 2, 3, 4 or 8 bits that stays packed, and slices of W itself.
//
// Words are int32 (ceil(K / 32) * bits, N): 32 codes of an output follow each other down a column, lowest bit first, so
// outputs lie side by side in memory and are the lanes of vectors. A weight is (code - zero point) * scale, with a zero
// point and a scale for each group of columns:
//
//     y[m, n] = sum over groups g of  scale[g, n] * (sum over k in g of x[m, k] * code[k, n]  -  zero[g, n] * sum of x)
//
// A code is not shifted to the lowest bits: its word is masked, and x[m, k] is divided by the power of two that the code
// is multiplied by there. Both are exact, so the result differs from its definition by the order of float32 sums alone.
//
// The vectors are those of GCC and Clang, which make code for whatever processor they compile for. The file is compiled
// for the processor that it runs on, once for each width (BITS).

#include <cstdint>
#include <cstring>
#include <memory>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace {

#define INLINE __attribute__((always_inline)) inline

constexpr int LANES = 16;
constexpr int TILE = 256;  // outputs at a time: their sums stay in the first cache

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
typedef uint8_t Bytes __attribute__((vector_size(LANES)));

enum Type { FLOAT32 = 0, FLOAT16 = 1, BFLOAT16 = 2 };

struct Weight {
    const uint32_t* words;
    const void* scales;           // (groups, N)
    const uint32_t* zero_points;  // (groups, ceil(N / 32) * bits), packed along the last axis, or null
    float zero_point;             // in place of zero_points
    int32_t scale_type;
    int64_t in_features, out_features, group_size;

    int64_t groups() const { return (in_features + group_size - 1) / group_size; }
    int64_t blocks() const { return (in_features + 31) / 32; }
};

template <class T>
inline T load(const void* from) {
    T value;
    std::memcpy(&value, from, sizeof(T));
    return value;
}

inline uint16_t to_bfloat16(float value) {  // to the nearest, ties to even
    uint32_t bits = load<uint32_t>(&value);
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// The scales of sixteen outputs, of which the first is number `index` of the tensor, in float32.
inline Floats load_scales(const Weight& w, int64_t index) {
    if (w.scale_type == FLOAT32) return load<Floats>(static_cast<const float*>(w.scales) + index);
    const Words given = __builtin_convertvector(load<Halves>(static_cast<const uint16_t*>(w.scales) + index), Words);
    if (w.scale_type == BFLOAT16) return reinterpret_cast<Floats>(given << 16);
    // The exponent of float16 is smaller by 112. A product also normalizes subnormal numbers; scales are finite.
    const Floats magnitude = reinterpret_cast<Floats>((given & 0x7fff) << 13) * 5.192296858534828e+33f;  // 2^112
    return reinterpret_cast<Floats>(reinterpret_cast<Words>(magnitude) | (given & 0x8000) << 16);
}

// The zero points of outputs n to n + 15 in a group, in float32; 16 divides n.
inline Floats load_zeros(const Weight& w, int64_t group, int64_t n) {
    if (!w.zero_points) return Floats{} + w.zero_point;
    const uint32_t* row = w.zero_points + group * ((w.out_features + 31) / 32 * BITS);
    const uint8_t* bytes = reinterpret_cast<const uint8_t*>(row) + n * BITS / 8;
#if BITS == 8
    return __builtin_convertvector(load<Bytes>(bytes), Floats);
#else  // eight codes are BITS bytes
    uint32_t low = 0, high = 0;
    std::memcpy(&low, bytes, BITS);
    std::memcpy(&high, bytes + BITS, BITS);
    constexpr Words lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const Words codes = (lane < 8 ? Words{} + low : Words{} + high) >> (lane & 7) * BITS & ((1u << BITS) - 1);
    return __builtin_convertvector(reinterpret_cast<Ints>(codes), Floats);
#endif
}

// Code number POSITION of 32, times 2^shift_of(POSITION).
constexpr int shift_of(int position) {
    const int shift = position * BITS % 32;
    return shift + BITS >= 32 ? 0 : shift;
}

template <int POSITION>
INLINE Floats code(const Words* block) {
    constexpr int word = POSITION * BITS / 32, shift = POSITION * BITS % 32;
    constexpr uint32_t mask = (1u << BITS) - 1;
    Words bits;
    if constexpr (shift + BITS > 32)
        bits = (block[word] >> shift | block[word + 1] << (32 - shift)) & mask;
    else if constexpr (shift + BITS == 32)
        bits = block[word] >> shift;  // only masked, it could be a negative number
    else
        bits = block[word] & mask << shift;
    return __builtin_convertvector(reinterpret_cast<Ints>(bits), Floats);
}

// Sums over the 32 columns of a block: `VECTORS` vectors of outputs by `ROWS` rows of x.
template <int ROWS, int VECTORS, int POSITION = 0>
INLINE void add_block(const Words (*block)[BITS], const float* x, int64_t stride, Floats (*sums)[ROWS]) {
    if constexpr (POSITION < 32) {
        Floats codes[VECTORS];
        for (int v = 0; v < VECTORS; ++v) codes[v] = code<POSITION>(block[v]);
        for (int m = 0; m < ROWS; ++m)
            for (int v = 0; v < VECTORS; ++v) sums[v][m] += codes[v] * x[m * stride + POSITION];
        add_block<ROWS, VECTORS, POSITION + 1>(block, x, stride, sums);
    }
}

#if defined(__AVX512BF16__)
// The same of x in bfloat16: two columns at a time, whose products are exact and summed in float32.
template <int ROWS, int VECTORS, int POSITION = 0>
INLINE void add_block(const Words (*block)[BITS], const uint16_t* x, int64_t stride, Floats (*sums)[ROWS]) {
    if constexpr (POSITION < 32) {
        __m512bh codes[VECTORS];
        for (int v = 0; v < VECTORS; ++v) {  // a code has at most eight significant bits, as bfloat16 has
            const Floats even = code<POSITION>(block[v]), odd = code<POSITION + 1>(block[v]);
            codes[v] = (__m512bh)(reinterpret_cast<Words>(even) >> 16 | reinterpret_cast<Words>(odd));
        }
        for (int m = 0; m < ROWS; ++m) {
            const __m512bh pair = (__m512bh)_mm512_set1_epi32(load<int32_t>(x + m * stride + POSITION));
            for (int v = 0; v < VECTORS; ++v)
                sums[v][m] = (Floats)_mm512_dpbf16_ps((__m512)sums[v][m], codes[v], pair);
        }
        add_block<ROWS, VECTORS, POSITION + 2>(block, x, stride, sums);
    }
}
#endif

template <int ROWS, int VECTORS, class X>
void tile(const Weight& w, const X* x, const float* totals, float* y, int64_t begin, int64_t end) {
    const int64_t groups = w.groups(), blocks = w.blocks(), stride = 32 * blocks, per_group = w.group_size / 32;
    alignas(64) float sums[ROWS][TILE], results[ROWS][TILE] = {};
    for (int64_t group = 0; group < groups; ++group) {
        std::memset(sums, 0, sizeof(sums));
        const int64_t last = (group + 1) * per_group < blocks ? (group + 1) * per_group : blocks;
        for (int64_t b = group * per_group; b < last; ++b) {
            const uint32_t* words = w.words + b * BITS * w.out_features + begin;
            for (int64_t n = 0; n < end - begin; n += LANES * VECTORS) {
                Words block[VECTORS][BITS];
                Floats part[VECTORS][ROWS];
                for (int v = 0; v < VECTORS; ++v) {
                    for (int i = 0; i < BITS; ++i)
                        block[v][i] = load<Words>(words + i * w.out_features + n + LANES * v);
                    for (int m = 0; m < ROWS; ++m) part[v][m] = load<Floats>(&sums[m][n + LANES * v]);
                }
                // Otherwise all numbers of x would be copied into vectors before this loop, which fill the first cache.
                asm volatile("" : : : "memory");
                add_block<ROWS, VECTORS>(block, x + b * 32, stride, part);
                for (int v = 0; v < VECTORS; ++v)
                    for (int m = 0; m < ROWS; ++m) std::memcpy(&sums[m][n + LANES * v], &part[v][m], sizeof(Floats));
            }
        }
        for (int64_t n = 0; n < end - begin; n += LANES) {
            const Floats scales = load_scales(w, group * w.out_features + begin + n);
            const Floats zeros = load_zeros(w, group, begin + n);
            for (int m = 0; m < ROWS; ++m) {
                const Floats sum = load<Floats>(&sums[m][n]) - zeros * totals[m * groups + group];
                const Floats result = load<Floats>(&results[m][n]) + scales * sum;
                std::memcpy(&results[m][n], &result, sizeof(result));
            }
        }
    }
    for (int m = 0; m < ROWS; ++m) std::memcpy(y + m * w.out_features + begin, results[m], sizeof(float) * (end - begin));
}

// Outputs that do not fill a vector.
inline float code_at(const Weight& w, int64_t k, int64_t n) {
    const uint32_t* column = w.words + k / 32 * BITS * w.out_features + n;
    const int bit = k % 32 * BITS;
    uint64_t code = column[bit / 32 * w.out_features] >> bit % 32;
    if (bit % 32 + BITS > 32) code |= uint64_t(column[(bit / 32 + 1) * w.out_features]) << (32 - bit % 32);
    return float(code & ((1u << BITS) - 1));
}

// The scale and the zero point of output n in a group. They are read with fifteen others, from a copy.
void parameters_at(const Weight& w, int64_t group, int64_t n, float* scale, float* zero) {
    uint16_t half[LANES] = {};
    float single[LANES] = {};
    uint32_t zeros[BITS] = {};
    const int64_t index = group * w.out_features + n;
    Weight one = w;
    one.scales = w.scale_type == FLOAT32 ? static_cast<const void*>(single) : half;
    if (w.scale_type == FLOAT32)
        single[0] = static_cast<const float*>(w.scales)[index];
    else
        half[0] = static_cast<const uint16_t*>(w.scales)[index];
    if (w.zero_points)
        std::memcpy(zeros, w.zero_points + group * ((w.out_features + 31) / 32 * BITS) + n / 32 * BITS, sizeof(zeros));
    one.zero_points = w.zero_points ? zeros : nullptr;
    *scale = load_scales(one, 0)[0];
    *zero = load_zeros(one, 0, n % 32 / LANES * LANES)[n % LANES];
}

void ragged(const Weight& w, const float* x, int64_t rows, float* y, int64_t begin) {
    for (int64_t n = begin; n < w.out_features; ++n) {
        for (int64_t m = 0; m < rows; ++m) y[m * w.out_features + n] = 0;
        for (int64_t group = 0; group < w.groups(); ++group) {
            float scale, zero;
            parameters_at(w, group, n, &scale, &zero);
            const int64_t start = group * w.group_size;
            const int64_t stop = start + w.group_size < w.in_features ? start + w.group_size : w.in_features;
            for (int64_t m = 0; m < rows; ++m) {
                float sum = 0;
                for (int64_t k = start; k < stop; ++k) sum += x[m * w.in_features + k] * (code_at(w, k, n) - zero);
                y[m * w.out_features + n] += scale * sum;
            }
        }
    }
}

// `ROWS` rows at once; x is padded with rows of zeros, and with columns of zeros to whole blocks.
template <int ROWS, class X>
void rows_at_once(const Weight& w, const X* x, const float* totals, float* y, int threads) {
    constexpr int VECTORS = ROWS >= 4 ? 2 : 4, STEP = LANES * VECTORS;
    const int64_t whole = w.out_features / LANES * LANES;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t begin = 0; begin < whole; begin += TILE) {
        const int64_t end = begin + TILE < whole ? begin + TILE : whole, wide = begin + (end - begin) / STEP * STEP;
        if (wide > begin) tile<ROWS, VECTORS>(w, x, totals, y, begin, wide);
        if (end > wide) tile<ROWS, 1>(w, x, totals, y, wide, end);
    }
}

template <int ROWS, class X>
void some_rows(const Weight& w, const float* x, int64_t rows, float* y, int threads) {
    const int64_t stride = 32 * w.blocks(), groups = w.groups();
    std::unique_ptr<X[]> scaled(new X[ROWS * stride]());
    std::unique_ptr<float[]> totals(new float[ROWS * groups]()), padded;
    for (int64_t m = 0; m < rows; ++m) {
        for (int64_t group = 0; group < groups; ++group) {
            const int64_t start = group * w.group_size;
            const int64_t stop = start + w.group_size < w.in_features ? start + w.group_size : w.in_features;
            float total = 0;
            for (int64_t k = start; k < stop; ++k) total += x[m * w.in_features + k];
            totals[m * groups + group] = total;
        }
        for (int64_t k = 0; k < w.in_features; ++k) {
            const float value = x[m * w.in_features + k] / float(1u << shift_of(int(k % 32)));
            if constexpr (sizeof(X) == 2)
                scaled[m * stride + k] = to_bfloat16(value);
            else
                scaled[m * stride + k] = value;
        }
    }
    float* target = y;
    if (rows < ROWS) {
        padded.reset(new float[ROWS * w.out_features]);
        target = padded.get();
    }
    rows_at_once<ROWS, X>(w, scaled.get(), totals.get(), target, threads);
    if (rows < ROWS) std::memcpy(y, target, sizeof(float) * rows * w.out_features);
    ragged(w, x, rows, y, w.out_features / LANES * LANES);
}

void all_rows(const Weight& w, const float* x, int64_t rows, bool is_bfloat16, float* y, int threads) {
    while (rows > 0) {
        const int64_t step = rows == 1 ? 1 : rows <= 4 ? rows : rows < 8 ? 4 : 8;
        if (step == 1)
            some_rows<1, float>(w, x, 1, y, threads);
        else if (step <= 4)
            some_rows<4, float>(w, x, step, y, threads);
#if defined(__AVX512BF16__)
        else if (is_bfloat16)
            some_rows<8, uint16_t>(w, x, step, y, threads);
#endif
        else
            some_rows<8, float>(w, x, step, y, threads);
        x += step * w.in_features, y += step * w.out_features, rows -= step;
    }
}

// A slice of W transposed: (K, end - begin), in float32 or bfloat16.
template <int POSITION, class T>
INLINE void store_block(const Words* block, const Floats scale, const Floats zero, T* out, int64_t stride, int count) {
    if constexpr (POSITION < 32) {
        if (POSITION >= count) return;
        const Floats codes = code<POSITION>(block) * (1.0f / float(1u << shift_of(POSITION)));
        const Floats values = (codes - zero) * scale;
        if constexpr (sizeof(T) == 4) {
            std::memcpy(out + POSITION * stride, &values, sizeof(values));
        } else {
#if defined(__AVX512BF16__)
            const __m256bh rounded = _mm512_cvtneps_pbh((__m512)values);
            std::memcpy(out + POSITION * stride, &rounded, sizeof(rounded));
#else
            for (int lane = 0; lane < LANES; ++lane) out[POSITION * stride + lane] = to_bfloat16(values[lane]);
#endif
        }
        store_block<POSITION + 1>(block, scale, zero, out, stride, count);
    }
}

template <class T>
void slice(const Weight& w, T* out, int64_t begin, int64_t end, int threads) {
    const int64_t width = end - begin, whole = width / LANES * LANES, per_group = w.group_size / 32;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t b = 0; b < w.blocks(); ++b) {
        const int64_t group = b / per_group;
        const int count = w.in_features - 32 * b < 32 ? int(w.in_features - 32 * b) : 32;
        T* rows = out + 32 * b * width;
        for (int64_t n = 0; n < whole; n += LANES) {
            Words block[BITS];
            for (int i = 0; i < BITS; ++i) block[i] = load<Words>(w.words + (b * BITS + i) * w.out_features + begin + n);
            const Floats scales = load_scales(w, group * w.out_features + begin + n);
            store_block<0>(block, scales, load_zeros(w, group, begin + n), rows + n, width, count);
        }
        for (int64_t n = whole; n < width; ++n) {
            float scale, zero;
            parameters_at(w, group, begin + n, &scale, &zero);
            for (int i = 0; i < count; ++i) {
                const float value = (code_at(w, 32 * b + i, begin + n) - zero) * scale;
                if constexpr (sizeof(T) == 4)
                    rows[i * width + n] = value;
                else
                    rows[i * width + n] = to_bfloat16(value);
            }
        }
    }
}

}  // namespace

extern "C" {

// y (rows, N) = x (rows, K) times W transposed, both float32. `is_bfloat16` says that x holds bfloat16 values.
void d2quant_products(const Weight* w, const float* x, int64_t rows, int is_bfloat16, float* y, int threads) {
    all_rows(*w, x, rows, is_bfloat16, y, threads);
}

// out (K, end - begin), in float32 or bfloat16: outputs `begin` to `end` of W transposed.
void d2quant_slice(const Weight* w, void* out, int is_bfloat16, int64_t begin, int64_t end, int threads) {
    if (is_bfloat16)
        slice(*w, static_cast<uint16_t*>(out), begin, end, threads);
    else
        slice(*w, static_cast<float*>(out), begin, end, threads);
}
}
