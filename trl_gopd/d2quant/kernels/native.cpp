// Products with a weight W of 2, 3, 4 or 8 bits that stays packed, and slices of W itself.
//
// A weight is (code - zero point) * scale, with a zero point and a scale for each group of columns:
//
//     y[m, n] = sum over groups g of  scale[g, n] * (sum over k in g of x[m, k] * code[k, n]  -  zero[g, n] * sum of x)
//
// A code is not shifted to the lowest bits: its word is masked, and x[m, k] is divided by the power of two that the code
// is multiplied by there. Both are exact, so the result differs from its definition by the order of float32 sums alone.
//
// Where x is rounded to eight bits, each row has a step of its own for every chunk of columns (a group, or 128 columns
// of a longer one): the largest magnitude there over 127. Sums of codes times steps are then exact, and times the step.
//
// The file is compiled for the processor that it runs on, once for each width (BITS).

#include "kinds.h"
#include "layout.h"

#include <memory>
#include <vector>

namespace {

constexpr int64_t CHUNK = 4;   // blocks of columns at a time, of one group
constexpr int64_t SLAB = 512;  // rows at a time, which bounds the copies of x

// Rows of x (rows, K) and of y (rows, N), and a bias (N) or null: all of one type, float32 or bfloat16.
struct Rows {
    const void* x;
    const void* bias;
    void* y;
    int32_t type;
    int64_t count;
};

// Rows of x as a kind takes them, `ROWS` at a time, padded with zeros.
template <class Kind, int ROWS>
struct Prepared {
    std::vector<int64_t> begins;               // the first block of each chunk, and the number of blocks
    std::vector<int64_t> groups;               // the group of each chunk
    std::unique_ptr<typename Kind::X[]> x;     // (batches, blocks, STEPS, ROWS)
    std::unique_ptr<float[]> totals, steps;    // (batches, chunks, ROWS): sums of what was packed, and its unit

    Prepared(const Weight& w, const Rows& r, int threads) {
        const int64_t per_group = w.group_size / BLOCK, blocks = w.blocks(), batches = (r.count + ROWS - 1) / ROWS;
        const int64_t length = per_group > CHUNK ? CHUNK : per_group;
        for (int64_t group = 0; group < w.groups(); ++group)
            for (int64_t b = group * per_group; b < (group + 1) * per_group && b < blocks; b += length) {
                begins.push_back(b);
                groups.push_back(group);
            }
        begins.push_back(blocks);
        x.reset(new typename Kind::X[batches * blocks * Kind::STEPS * ROWS]());
        totals.reset(new float[batches * groups.size() * ROWS]());
        steps.reset(new float[batches * groups.size() * ROWS]());
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1 && batches > 1)
        for (int64_t m = 0; m < r.count; ++m)
            for (int64_t chunk = 0; chunk < chunks(); ++chunk) prepare(w, r, m, chunk);
    }

    int64_t chunks() const { return int64_t(groups.size()); }

    // One chunk of a row.
    void prepare(const Weight& w, const Rows& r, int64_t m, int64_t chunk) {
        const int64_t begin = begins[chunk], end = begins[chunk + 1], of = (m / ROWS * chunks() + chunk) * ROWS + m % ROWS;
        typename Kind::X* to = &x[(m / ROWS * w.blocks() + begin) * Kind::STEPS * ROWS + m % ROWS];
        float step = 1;
        if constexpr (Kind::ROUNDS) step = largest(w, r, m, begin, end) / 127;
        const float inverse = step > 1e-38f ? 1 / step : 0;
        Floats total = {};
        for (int64_t b = begin; b < end; ++b, to += Kind::STEPS * ROWS) {
            Floats parts[PARTS];
            for (int part = 0; part < PARTS; ++part) {
                parts[part] = columns(w, r, m, BLOCK * b + part * LANES);
                constexpr float ROUND = 12582912;  // 3 * 2^22, whose last bit is worth one
                if constexpr (Kind::ROUNDS) parts[part] = parts[part] * inverse + ROUND - ROUND;
                total += parts[part];
            }
            Kind::pack(parts, to, ROWS);
        }
        for (int lane = 0; lane < LANES; ++lane) totals[of] += total[lane];
        steps[of] = step;
    }

    // The largest magnitude in the blocks `begin` to `end` of a row; NaN if a number is not finite.
    static float largest(const Weight& w, const Rows& r, int64_t m, int64_t begin, int64_t end) {
        Floats most = {}, check = {};
        for (int64_t k = BLOCK * begin; k < BLOCK * end; k += LANES) {
            const Floats values = columns(w, r, m, k), magnitudes = values < 0 ? -values : values;
            most = magnitudes > most ? magnitudes : most;
            check += values - values;  // 0 or NaN
        }
        float result = 0, sum = 0;
        for (int lane = 0; lane < LANES; ++lane) {
            result = most[lane] > result ? most[lane] : result;
            sum += check[lane];
        }
        return result + sum;
    }

    // As many numbers of a row as a vector has, from column k on; zeros behind its end.
    static INLINE Floats columns(const Weight& w, const Rows& r, int64_t m, int64_t k) {
        if (k + LANES <= w.in_features) return load_numbers(r.x, m * w.in_features + k, r.type);
        Floats values = {};
        for (int lane = 0; k + lane < w.in_features; ++lane)
            values[lane] = load_number(r.x, m * w.in_features + k + lane, r.type);
        return values;
    }
};

// Recursion in place of loops: with indices that are constant from the start, sums stay in registers.
template <class Kind, int ROWS, int VECTORS, int AT = 0, class Codes>
INLINE void add_products(const Codes* codes, const typename Kind::X* x, typename Kind::Sums (*sums)[ROWS]) {
    if constexpr (AT < ROWS * VECTORS) {
        constexpr int m = AT / VECTORS, v = AT % VECTORS;
        sums[v][m] = Kind::add(sums[v][m], codes[v], x[m]);
        add_products<Kind, ROWS, VECTORS, AT + 1>(codes, x, sums);
    }
}

template <class Kind, int ROWS, int VECTORS, int STEP = 0>
INLINE void add_block(const Words (*block)[BITS], const typename Kind::X* x, typename Kind::Sums (*sums)[ROWS]) {
    if constexpr (STEP < Kind::STEPS) {
        decltype(Kind::template codes<STEP>(block[0])) codes[VECTORS];
        for (int v = 0; v < VECTORS; ++v) codes[v] = Kind::template codes<STEP>(block[v]);
        add_products<Kind, ROWS, VECTORS>(codes, x + STEP * ROWS, sums);
        add_block<Kind, ROWS, VECTORS, STEP + 1>(block, x, sums);
    }
}

// Outputs at a time: their results stay in the first cache, and rows of words are read in long runs.
constexpr int tile_of(int rows) { return rows == 1 ? 1024 : rows == 4 ? 512 : 256; }

// Rows at a time, if there are so many: their sums have to fit into registers.
#if defined(__AVX2__) && !defined(__AVX512F__)
constexpr int MANY = 4;
#else
constexpr int MANY = 8;
#endif

// Some outputs of the weight, or a copy of them. Rows of words and of parameters are `stride` apart.
struct Tile {
    const uint32_t* words;
    int64_t stride, begin, end;
    const float* scales;  // of chunks, in float32, or null if they are to be read from the weight
    const float* zeros;
};

template <class Kind, int ROWS, int VECTORS>
void multiply_tile(const Weight& w, const Tile& t, const Prepared<Kind, ROWS>& p, const Rows& r, int64_t batch) {
    alignas(64) float results[ROWS][tile_of(ROWS)] = {};
    const int64_t N = w.out_features, chunks = p.chunks(), count = t.end - t.begin;
    const typename Kind::X* x = &p.x[batch * w.blocks() * Kind::STEPS * ROWS];
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const int64_t first = p.begins[chunk], last = p.begins[chunk + 1], of = (batch * chunks + chunk) * ROWS;
        for (int64_t n = 0; n < count; n += LANES * VECTORS) {
            typename Kind::Sums sums[VECTORS][ROWS] = {};
            for (int64_t b = first; b < last; ++b) {
                const uint32_t* words = t.words + b * BITS * t.stride + n;
                Words block[VECTORS][BITS];
                for (int v = 0; v < VECTORS; ++v)
                    for (int i = 0; i < BITS; ++i) {
                        block[v][i] = load<Words>(words + i * t.stride + LANES * v);
                        // The next chunk lies far away: no processor foresees that it will be read.
                        __builtin_prefetch(words + (i + (last - first) * BITS) * t.stride + LANES * v);
                    }
                // Otherwise all numbers of x would be copied into vectors before these loops.
                asm volatile("" : : : "memory");
                add_block<Kind, ROWS, VECTORS>(block, x + b * Kind::STEPS * ROWS, sums);
            }
            for (int v = 0; v < VECTORS; ++v) {
                const int64_t at = n + LANES * v, group = p.groups[chunk];
                Floats scales, zeros;
                if (t.scales) {
                    scales = load<Floats>(t.scales + chunk * t.stride + at);
                    zeros = load<Floats>(t.zeros + chunk * t.stride + at);
                } else {
                    scales = load_scales(w, group * N + t.begin + at);
                    zeros = load_zeros(w, group, t.begin + at);
                }
                for (int m = 0; m < ROWS; ++m) {
                    const Floats sum = __builtin_convertvector(sums[v][m], Floats) - zeros * p.totals[of + m];
                    const Floats result = load<Floats>(&results[m][at]) + scales * p.steps[of + m] * sum;
                    std::memcpy(&results[m][at], &result, sizeof(result));
                }
            }
        }
    }
    for (int64_t m = batch * ROWS; m < (batch + 1) * ROWS && m < r.count; ++m)
        for (int64_t n = 0; n < count; n += LANES) {
            Floats result = load<Floats>(&results[m - batch * ROWS][n]);
            if (r.bias) result += load_numbers(r.bias, t.begin + n, r.type);
            store_numbers(r.y, m * N + t.begin + n, r.type, result);
        }
}

// All batches of rows times outputs `begin` to `end`.
template <class Kind, int ROWS>
void multiply_outputs(const Weight& w, const Prepared<Kind, ROWS>& p, const Rows& r, int64_t begin, int64_t end) {
    constexpr int VECTORS = ROWS >= 4 ? 2 : 4, STEP = LANES * VECTORS;
    const int64_t batches = (r.count + ROWS - 1) / ROWS, wide = begin + (end - begin) / STEP * STEP;
    Tile t{w.words + begin, w.out_features, begin, end, nullptr, nullptr};
    std::unique_ptr<uint32_t[]> words;
    std::unique_ptr<float[]> scales, zeros;
    if (batches > 1) {  // rows of words that are a power of two apart would drive each other out of the second cache
        const int64_t count = end - begin, rows = w.blocks() * BITS;
        words.reset(new uint32_t[rows * count]);
        for (int64_t i = 0; i < rows; ++i) {
            for (int64_t n = 0; n < count; n += LANES) __builtin_prefetch(t.words + (i + 8) * t.stride + n);
            std::memcpy(&words[i * count], t.words + i * t.stride, 4 * count);
        }
        scales.reset(new float[p.chunks() * count]);
        zeros.reset(new float[p.chunks() * count]);
        for (int64_t chunk = 0; chunk < p.chunks(); ++chunk)
            for (int64_t n = 0; n < count; n += LANES) {
                store_numbers(&scales[chunk * count], n, FLOAT32, load_scales(w, p.groups[chunk] * w.out_features + begin + n));
                store_numbers(&zeros[chunk * count], n, FLOAT32, load_zeros(w, p.groups[chunk], begin + n));
            }
        t = Tile{words.get(), count, begin, end, scales.get(), zeros.get()};
    }
    Tile many = t, few = t;
    many.end = few.begin = wide;
    few.words += wide - begin;
    if (t.scales) few.scales += wide - begin, few.zeros += wide - begin;
    for (int64_t batch = 0; batch < batches; ++batch) {
        if (wide > begin) multiply_tile<Kind, ROWS, VECTORS>(w, many, p, r, batch);
        if (end > wide) multiply_tile<Kind, ROWS, 1>(w, few, p, r, batch);
    }
}

template <class Kind, int ROWS>
void sweep(const Weight& w, const Rows& r, int threads) {
    const Prepared<Kind, ROWS> p(w, r, threads);
    const int64_t whole = w.out_features / LANES * LANES;
    // All threads have as many tiles.
    const int64_t tiles = ((whole + tile_of(ROWS) - 1) / tile_of(ROWS) + threads - 1) / threads * threads;
    const int64_t length = tiles ? (whole + tiles * LANES - 1) / (tiles * LANES) * LANES : 1;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t begin = 0; begin < whole; begin += length)
        multiply_outputs<Kind, ROWS>(w, p, r, begin, begin + length < whole ? begin + length : whole);
}

// Outputs that do not fill a vector. They are few, so that x is not rounded.
void ragged(const Weight& w, const Rows& r) {
    for (int64_t n = w.out_features / LANES * LANES; n < w.out_features; ++n) {
        for (int64_t m = 0; m < r.count; ++m) {
            float result = r.bias ? load_number(r.bias, n, r.type) : 0;
            for (int64_t group = 0; group < w.groups(); ++group) {
                float scale, zero, sum = 0;
                parameters_at(w, group, n, &scale, &zero);
                for (int64_t k = group * w.group_size; k < w.group_end(group); ++k)
                    sum += load_number(r.x, m * w.in_features + k, r.type) * (code_at(w, k, n) - zero);
                result += scale * sum;
            }
            store_number(r.y, m * w.out_features + n, r.type, result);
        }
    }
}

template <class Few, class Many>
void multiply(const Weight& w, Rows r, int threads) {
    const int64_t rows = r.count, size = r.type == FLOAT32 ? 4 : 2;
    for (int64_t done = 0; done < rows; done += SLAB) {
        r.count = rows - done < SLAB ? rows - done : SLAB;
        if (r.count == 1)
            sweep<Few, 1>(w, r, threads);
        else if (r.count <= 4)
            sweep<Few, 4>(w, r, threads);
        else
            sweep<Many, MANY>(w, r, threads);
        ragged(w, r);
        r.x = static_cast<const char*>(r.x) + SLAB * w.in_features * size;
        r.y = static_cast<char*>(r.y) + SLAB * w.out_features * size;
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
#else
            const Halves rounded = to_bfloat16(values);
#endif
            std::memcpy(out + POSITION * stride, &rounded, sizeof(rounded));
        }
        store_block<POSITION + 1>(block, scale, zero, out, stride, count);
    }
}

template <class T>
void slice(const Weight& w, T* out, int64_t begin, int64_t end, int threads) {
    const int64_t width = end - begin, whole = width / LANES * LANES, per_group = w.group_size / BLOCK;
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
                store_number(rows, i * width + n, sizeof(T) == 4 ? FLOAT32 : BFLOAT16, value);
            }
        }
    }
}

}  // namespace

extern "C" {

// y (rows, N) = x (rows, K) times W transposed, plus a bias (N) unless it is null, all of one type: float32 or bfloat16.
// `rounds` says that x is rounded to eight bits.
void d2quant_products(const uint32_t* words, const void* scales, const uint32_t* zero_points, int scale_type,
                      int64_t in_features, int64_t out_features, int64_t group_size, const void* x, const void* bias,
                      void* y, int type, int64_t rows, int rounds, int threads) {
    const Weight w{words, scales, zero_points, scale_type, in_features, out_features, group_size};
    const Rows r{x, bias, y, type, rows};
    if (rounds) return multiply<Quad, Quad>(w, r, threads);
#if defined(__AVX512BF16__)
    if (type == BFLOAT16) return multiply<Single, Pair>(w, r, threads);
#endif
    multiply<Single, Single>(w, r, threads);
}

// Up to so many rows of a type, products with packed words take less time than rebuilding W for a matrix product.
int d2quant_few_rows(int type) {
#if defined(__AVX512BF16__)
    return type == FLOAT32 ? 1 << 30 : 64;
#elif defined(__AVX512F__)
    return type == FLOAT32 ? 1 << 30 : 32;
#else
    return type == FLOAT32 ? 16 : 8;
#endif
}

// out (K, end - begin), in float32 or bfloat16: outputs `begin` to `end` of W transposed.
void d2quant_slice(const uint32_t* words, const void* scales, const uint32_t* zero_points, int scale_type,
                   int64_t in_features, int64_t out_features, int64_t group_size, void* out, int type, int64_t begin,
                   int64_t end, int threads) {
    const Weight w{words, scales, zero_points, scale_type, in_features, out_features, group_size};
    if (type == BFLOAT16)
        slice(w, static_cast<uint16_t*>(out), begin, end, threads);
    else
        slice(w, static_cast<float*>(out), begin, end, threads);
}
}
