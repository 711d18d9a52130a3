// How packed weights lie in memory, and vectors of their codes, scales and zero points. BITS is the width of a code.
//
// Words are int32 (ceil(K / 32) * BITS, N): 32 codes of an output, a block, follow each other down a column, lowest bit
// first, so outputs lie side by side in memory and are the lanes of vectors. The vectors are those of GCC and Clang,
// which make code for whatever processor they compile for.

#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

#define INLINE __attribute__((always_inline)) inline

// As many as the registers of the processor have: compilers divide longer vectors badly.
#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
constexpr int BLOCK = 32, PARTS = BLOCK / LANES;  // vectors of a block of columns

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
typedef uint8_t Bytes __attribute__((vector_size(LANES)));

enum Type { FLOAT32 = 0, FLOAT16 = 1, BFLOAT16 = 2 };

struct Weight {
    const uint32_t* words;
    const void* scales;           // (groups, N) of scale_type
    const uint32_t* zero_points;  // (groups, ceil(N / 32) * BITS), packed along the last axis; null if mid-rise
    int32_t scale_type;
    int64_t in_features, out_features, group_size;

    int64_t groups() const { return (in_features + group_size - 1) / group_size; }
    int64_t blocks() const { return (in_features + 31) / 32; }
    int64_t group_end(int64_t group) const { return (group + 1) * group_size < in_features ? (group + 1) * group_size : in_features; }
};

template <class T>
inline T load(const void* from) {
    T value;
    std::memcpy(&value, from, sizeof(T));
    return value;
}

// To the nearest, ties to even. What is not a number stays so whatever its lowest bits are.
INLINE Halves to_bfloat16(Floats values) {
    const Words bits = reinterpret_cast<Words>(values);
    const Words rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return __builtin_convertvector(values == values ? rounded : Words{} + 0x7fc0, Halves);
}

// Numbers of float32 or bfloat16, of which the first is number `index`, in float32.
INLINE Floats load_numbers(const void* from, int64_t index, int32_t type) {
    if (type == FLOAT32) return load<Floats>(static_cast<const float*>(from) + index);
    const Halves given = load<Halves>(static_cast<const uint16_t*>(from) + index);
    return reinterpret_cast<Floats>(__builtin_convertvector(given, Words) << 16);
}

INLINE void store_numbers(void* to, int64_t index, int32_t type, Floats values) {
    if (type == FLOAT32) {
        std::memcpy(static_cast<float*>(to) + index, &values, sizeof(values));
    } else {
        const Halves rounded = to_bfloat16(values);
        std::memcpy(static_cast<uint16_t*>(to) + index, &rounded, sizeof(rounded));
    }
}

inline float load_number(const void* from, int64_t index, int32_t type) {
    if (type == FLOAT32) return static_cast<const float*>(from)[index];
    const uint32_t bits = uint32_t(static_cast<const uint16_t*>(from)[index]) << 16;
    return load<float>(&bits);
}

inline void store_number(void* to, int64_t index, int32_t type, float value) {
    if (type == FLOAT32)
        static_cast<float*>(to)[index] = value;
    else
        static_cast<uint16_t*>(to)[index] = to_bfloat16(Floats{} + value)[0];
}

// Scales, of which the first is number `index` of the tensor, in float32.
INLINE Floats load_scales(const Weight& w, int64_t index) {
    if (w.scale_type != FLOAT16) return load_numbers(w.scales, index, w.scale_type);
    const Words given = __builtin_convertvector(load<Halves>(static_cast<const uint16_t*>(w.scales) + index), Words);
    // The exponent of float16 is smaller by 112. A product also normalizes subnormal numbers; scales are finite.
    const Floats magnitude = reinterpret_cast<Floats>((given & 0x7fff) << 13) * 5.192296858534828e+33f;  // 2^112
    return reinterpret_cast<Floats>(reinterpret_cast<Words>(magnitude) | (given & 0x8000) << 16);
}

// The zero points of as many outputs as a vector has, from n on, in float32; LANES divides n.
INLINE Floats load_zeros(const Weight& w, int64_t group, int64_t n) {
    if (!w.zero_points) return Floats{} + float((1 << BITS) - 1) / 2;
    const uint32_t* row = w.zero_points + group * ((w.out_features + 31) / 32 * BITS);
    const uint8_t* bytes = reinterpret_cast<const uint8_t*>(row);
#if BITS == 8
    return __builtin_convertvector(load<Bytes>(bytes + n), Floats);
#else
    uint32_t low = 0, high = 0;  // eight codes are BITS bytes
    std::memcpy(&low, bytes + n / 8 * BITS, BITS);
    if (LANES > 8) std::memcpy(&high, bytes + (n / 8 + 1) * BITS, BITS);
    Words lane;
    for (int i = 0; i < LANES; ++i) lane[i] = i;
    const uint32_t first = LANES < 8 ? n % 8 : 0;
    const Words codes = (lane < 8 ? Words{} + low : Words{} + high) >> ((lane + first) & 7) * BITS & ((1u << BITS) - 1);
    return __builtin_convertvector(reinterpret_cast<Ints>(codes), Floats);
#endif
}

// The scale and the zero point of output n in a group. They are read as those of a vector, from a copy.
inline void parameters_at(const Weight& w, int64_t group, int64_t n, float* scale, float* zero) {
    uint16_t half[LANES] = {};
    float single[LANES] = {};
    uint32_t zeros[BITS] = {};  // of 32 outputs
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

inline float code_at(const Weight& w, int64_t k, int64_t n) {
    const uint32_t* column = w.words + k / 32 * BITS * w.out_features + n;
    const int bit = k % 32 * BITS;
    uint64_t code = column[bit / 32 * w.out_features] >> bit % 32;
    if (bit % 32 + BITS > 32) code |= uint64_t(column[(bit / 32 + 1) * w.out_features]) << (32 - bit % 32);
    return float(code & ((1u << BITS) - 1));
}



}  // namespace
