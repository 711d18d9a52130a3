// How a block of packed codes is multiplied by rows of x: in float32, in pairs of bfloat16, or in quads of eight bits.
//
// Each kind takes one or more codes out of packed words at a time (`codes`), as many as fit into a lane of 32 bits, and
// adds their products with numbers of a row, which fill 32 bits too, to sums (`add`). A block has STEPS of these.

#pragma once

#include "layout.h"

namespace {

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

// What the numbers of x in a part of a block are multiplied by, since codes are not shifted to the lowest bits.
INLINE Floats inverse_shifts(int part) {
    Floats inverse;
    for (int lane = 0; lane < LANES; ++lane) inverse[lane] = 1.0f / float(1u << shift_of(part * LANES + lane));
    return inverse;
}

struct Single {
    typedef Floats Sums;
    typedef float X;
    static constexpr int STEPS = 32;
    static constexpr bool ROUNDS = false;

    template <int STEP>
    static INLINE Floats codes(const Words* block) {
        return code<STEP>(block);
    }
    static INLINE Floats add(Floats sums, Floats codes, float x) { return sums + codes * x; }
    static INLINE void pack(const Floats* parts, X* x, int64_t stride) {
        for (int part = 0; part < PARTS; ++part) {
            const Floats values = parts[part] * inverse_shifts(part);
            for (int lane = 0; lane < LANES; ++lane) x[(part * LANES + lane) * stride] = values[lane];
        }
    }
};

#if defined(__AVX512BF16__)
// Of x in bfloat16: products are exact, since a code has at most eight significant bits, as bfloat16 has, and are summed
// in float32.
struct Pair {
    typedef Floats Sums;
    typedef int32_t X;
    static constexpr int STEPS = 16;
    static constexpr bool ROUNDS = false;

    template <int STEP>
    static INLINE Words codes(const Words* block) {
        return reinterpret_cast<Words>(code<2 * STEP>(block)) >> 16 | reinterpret_cast<Words>(code<2 * STEP + 1>(block));
    }
    static INLINE Floats add(Floats sums, Words codes, int32_t x) {
        return (Floats)_mm512_dpbf16_ps((__m512)sums, (__m512bh)codes, (__m512bh)_mm512_set1_epi32(x));
    }
    static INLINE void pack(const Floats* parts, X* x, int64_t stride) {
        for (int part = 0; part < PARTS; ++part) {
            const Words bits = reinterpret_cast<Words>(parts[part] * inverse_shifts(part));
            for (int lane = 0; lane < LANES; lane += 2)
                x[(part * LANES + lane) / 2 * stride] = int32_t(bits[lane] >> 16 | (bits[lane + 1] & 0xffff0000));
        }
    }
};
#endif

// Of x rounded to whole numbers of at most 127, with sums in int32. Which four codes are a quad follows from how few
// instructions take them out of the words.
struct Quad {
    typedef Ints Sums;
    typedef int32_t X;
    static constexpr int STEPS = 8;
    static constexpr bool ROUNDS = true;

    // The column of a block that is byte `byte` of a quad.
    static constexpr int column(int quad, int byte) {
        constexpr int apart = BITS == 3 ? 1 : 8 / BITS;
        return BITS == 3 ? 4 * quad + byte : quad / apart * (32 / BITS) + quad % apart + apart * byte;
    }

    template <int STEP>
    static INLINE Words codes(const Words* block) {
#if BITS == 3
        constexpr int word = 12 * STEP / 32, shift = 12 * STEP % 32;
        constexpr bool straddles = shift + 12 > 32;
        constexpr int low = straddles ? 0 : shift;  // from this bit on, twelve bits are four codes
        Words bits = block[word];
        if constexpr (straddles) bits = bits >> shift | block[word + 1] << (32 - shift);
#if defined(__AVX512VBMI__)
        constexpr int64_t from = low | (low + 3) << 8 | (low + 6) << 16 | int64_t(low + 9) << 24;
        const __m512i spread = _mm512_set1_epi64(from | (from + 0x20202020) << 32);
        return reinterpret_cast<Words>(_mm512_multishift_epi64_epi8(spread, (__m512i)bits)) & 0x07070707;
#else
        bits >>= low;
        return (bits & 7) | (bits << 5 & 0x700) | (bits << 10 & 0x70000) | (bits << 15 & 0x7000000);
#endif
#else
        constexpr int in_word = 8 / BITS;
        return block[STEP / in_word] >> STEP % in_word * BITS & ((1u << BITS) - 1) * 0x01010101u;
#endif
    }
    static INLINE Ints add(Ints sums, Words codes, int32_t x) {
#if defined(__AVX512VNNI__)
        return (Ints)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)codes, _mm512_set1_epi32(x));
#elif defined(__AVX2__) && BITS <= 4  // pairs of products fit into 16 bits
        const __m256i pairs = _mm256_maddubs_epi16((__m256i)codes, _mm256_set1_epi32(x));
        return sums + (Ints)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#else
        for (int byte = 0; byte < 4; ++byte)
            sums += reinterpret_cast<Ints>(codes >> 8 * byte & 255) * int32_t(int8_t(x >> 8 * byte));
        return sums;
#endif
    }
    static INLINE void pack(const Floats* parts, X* x, int64_t stride) {
        int8_t bytes[BLOCK];
        for (int part = 0; part < PARTS; ++part) {
            const Words whole = reinterpret_cast<Words>(__builtin_convertvector(parts[part], Ints)) & 255;
            const Bytes low = __builtin_convertvector(whole, Bytes);
            std::memcpy(bytes + part * LANES, &low, sizeof(low));
        }
        for (int quad = 0; quad < STEPS; ++quad) {
            int8_t of_quad[4];
            for (int byte = 0; byte < 4; ++byte) of_quad[byte] = bytes[column(quad, byte)];
            std::memcpy(x + quad * stride, of_quad, 4);
        }
    }
};

}  // namespace
