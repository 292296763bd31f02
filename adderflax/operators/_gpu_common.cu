// What the texts of all kernels begin with, after the constants of one problem: operands of any
// dtype, and accesses to several elements at once.

#ifndef GPU_EMULATION
#define UNROLL _Pragma("unroll")

__device__ __forceinline__ float half_bits_to_float(unsigned short bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}

// sum + |a - b| over the four bytes of each: one instruction up to compute capability 10.
__device__ __forceinline__ unsigned add_byte_differences(unsigned sum, unsigned a, unsigned b) {
  asm("vabsdiff4.u32.u32.u32.add %0, %1, %2, %0;" : "+r"(sum) : "r"(a), "r"(b));
  return sum;
}

// The compiler takes an assignment of four floats apart.
__device__ __forceinline__ void store_four(float* to, float a, float b, float c, float d) {
  asm volatile("st.global.v4.f32 [%0], {%1, %2, %3, %4};"
               ::"l"(to), "f"(a), "f"(b), "f"(c), "f"(d) : "memory");
}
#endif

struct bfloat16 { unsigned short bits; };
struct float16 { unsigned short bits; };
struct bytes { unsigned bits; };  // four uint8

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(bfloat16 value) {
  return __uint_as_float(static_cast<unsigned>(value.bits) << 16);
}
__device__ __forceinline__ float to_float(float16 value) { return half_bits_to_float(value.bits); }

// Only to be moved: their bits as a float's.
__device__ __forceinline__ float to_float(bytes value) { return __uint_as_float(value.bits); }

template <typename T, int WIDTH>
struct alignas(sizeof(T) * WIDTH) Vector {
  T at[WIDTH];
};

