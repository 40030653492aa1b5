// One loop, compiled for several instruction sets, and functions that such a loop can vectorise.
#pragma once

#include <bit>
#include <cstdint>
#include <limits>

// Put before a function's definition: GCC compiles it for each instruction set, and the first call
// picks the best one that the processor has. A function that it calls is compiled with it only if
// inlined, so inner loops may call CLAFUSION_INLINE functions and no lambda. With other compilers,
// and under AddressSanitizer (the choice would run before it is ready), the function is compiled
// once, for the compiler's target.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__linux__) && \
    !defined(__SANITIZE_ADDRESS__)
#define CLAFUSION_MULTIVERSION \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#define CLAFUSION_HAS_MULTIVERSION 1
#else
#define CLAFUSION_MULTIVERSION
#define CLAFUSION_HAS_MULTIVERSION 0
#endif

#if defined(__GNUC__) || defined(__clang__)
#define CLAFUSION_INLINE inline __attribute__((always_inline))
#elif defined(_MSC_VER)
#define CLAFUSION_INLINE __forceinline
#else
#define CLAFUSION_INLINE inline
#endif

// Put before a loop each of whose iterations reads and writes its own places only, even where what
// it reads and what it writes are the same memory.
#if defined(__clang__)
#define CLAFUSION_IVDEP _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__)
#define CLAFUSION_IVDEP _Pragma("GCC ivdep")
#elif defined(_MSC_VER)
#define CLAFUSION_IVDEP __pragma(loop(ivdep))
#else
#define CLAFUSION_IVDEP
#endif

namespace clafusion::simd {

// The instruction set that CLAFUSION_MULTIVERSION picks: "avx512", "avx2" or "baseline".
inline const char* level() {
#if CLAFUSION_HAS_MULTIVERSION
  if (__builtin_cpu_supports("x86-64-v4")) return "avx512";
  if (__builtin_cpu_supports("x86-64-v3")) return "avx2";
#endif
  return "baseline";
}

// e^x, relative error below 2e-7 (3 ulp). 0 from -87.33 down (no denormal results), +inf from
// 88.73 up, NaN for NaN.
CLAFUSION_INLINE float exp(float x) {
  constexpr float kLow = -87.33654f;
  constexpr float kHigh = 88.72283f;
  const float c = x < kLow ? kLow : (x > kHigh ? kHigh : x);
  // n = round(c / log 2): adding 1.5 * 2^23 leaves the integer in the low bits.
  constexpr float kShift = 12582912.0f;
  const float shifted = c * 1.44269504f + kShift;
  const float n = shifted - kShift;
  const float r = (c - n * 0.693359375f) - n * -2.12194440e-4f;  // log 2 in two parts
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  // 2^n by its bits, in two steps: n = 128 has no float of its own.
  const std::int32_t bits = std::bit_cast<std::int32_t>(shifted) - 0x4B400000;
  const std::int32_t half = bits >> 1;
  const float a = std::bit_cast<float>((half + 127) << 23);
  const float b = std::bit_cast<float>((bits - half + 127) << 23);
  const float y = p * a * b;
  const float low = x < kLow ? 0.0f : y;
  return x > kHigh ? std::numeric_limits<float>::infinity() : low;
}

// log x, absolute error below 1e-7 near 1 and relative error below 2e-7 elsewhere. -inf for 0,
// NaN below 0 and for NaN, +inf for +inf; denormal numbers are exact like all others.
CLAFUSION_INLINE float log(float x) {
  const bool tiny = x < std::numeric_limits<float>::min();
  const float scaled = tiny ? x * 8388608.0f : x;
  // x = m * 2^e with m in [sqrt(1/2), sqrt(2))
  const std::int32_t bits = std::bit_cast<std::int32_t>(scaled);
  const std::int32_t e = (bits - 0x3F3504F3) >> 23;
  const float m = std::bit_cast<float>(bits - (e << 23));
  const float n = static_cast<float>(e) - (tiny ? 23.0f : 0.0f);
  const float r = m - 1.0f;
  const float r2 = r * r;
  float p = 7.0376836292e-2f;
  p = p * r - 1.1514610310e-1f;
  p = p * r + 1.1676998740e-1f;
  p = p * r - 1.2420140846e-1f;
  p = p * r + 1.4249322787e-1f;
  p = p * r - 1.6668057665e-1f;
  p = p * r + 2.0000714765e-1f;
  p = p * r - 2.4999993993e-1f;
  p = p * r + 3.3333331174e-1f;
  const float y = r + (r2 * r * p - n * 2.12194440e-4f - 0.5f * r2) + n * 0.693359375f;
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  const float special = x == 0.0f ? -kInfinity : std::numeric_limits<float>::quiet_NaN();
  const float positive = x == kInfinity ? x : y;
  return x > 0.0f ? positive : special;
}

// e^x, relative error below 4e-16. 0 from -708.39 down (no denormal results), +inf from 709.78
// up, NaN for NaN.
CLAFUSION_INLINE double exp(double x) {
  constexpr double kLow = -708.396418532264;
  constexpr double kHigh = 709.782712893384;
  const double c = x < kLow ? kLow : (x > kHigh ? kHigh : x);
  constexpr double kShift = 6755399441055744.0;  // 1.5 * 2^52
  const double shifted = c * 1.4426950408889634 + kShift;
  const double n = shifted - kShift;
  const double r = (c - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10;
  // Taylor: |r| <= log(2) / 2, the first term left out is below 1.8e-17
  double p = 1.6059043836821613e-10;
  p = p * r + 2.08767569878681e-09;
  p = p * r + 2.505210838544172e-08;
  p = p * r + 2.755731922398589e-07;
  p = p * r + 2.7557319223985893e-06;
  p = p * r + 2.48015873015873e-05;
  p = p * r + 1.984126984126984e-04;
  p = p * r + 1.388888888888889e-03;
  p = p * r + 8.333333333333333e-03;
  p = p * r + 4.1666666666666664e-02;
  p = p * r + 1.6666666666666666e-01;
  p = p * r + 0.5;
  p = p * r * r + r + 1.0;
  // 2^n in two steps, from unsigned bits: AVX2 has no arithmetic shift of 64 bits.
  const std::uint64_t biased = std::bit_cast<std::uint64_t>(shifted) - 0x4338000000000000 + 2048;
  const std::uint64_t half = biased >> 1;
  const double a = std::bit_cast<double>((half - 1) << 52);
  const double b = std::bit_cast<double>((biased - half - 1) << 52);
  const double y = p * a * b;
  const double low = x < kLow ? 0.0 : y;
  return x > kHigh ? std::numeric_limits<double>::infinity() : low;
}

}  // namespace clafusion::simd
