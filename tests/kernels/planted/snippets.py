"""Pieces of Metal, legal and not, that C++ may see otherwise. x: 64 floats; few: two."""

from __future__ import annotations

from dataclasses import dataclass

INDEX = "uint i = thread_position_in_grid.x;\n"
STORE = "\ny[i] = x[i];"


@dataclass(frozen=True)
class Snippet:
    name: str
    body: str
    header: str
    says: str  # part of the message


def body(name: str, text: str, says: str = "") -> Snippet:
    return Snippet(name, INDEX + text + STORE, "", says)


def helper(name: str, text: str, says: str = "", call: str = "") -> Snippet:
    return Snippet(name, INDEX + call + STORE, text + "\n", says)


# Refused by the lint.
ILLEGAL = [
    body("double", "double d = 1.0;", "no double"),
    body("long double", "long double d = 1.0;", "no double"),
    body("long long", "long long n = 1;", "no long long"),
    body("a long long literal", "auto n = 1LL;", "no long long"),
    body(
        "goto",
        """
        if (i > 99) goto end;
        end:
""",
        "no goto",
    ),
    body("new", "thread float* p = new float;", "no dynamic memory"),
    body("throw", "if (i > 99) throw 1;", "no exceptions"),
    body("lambda", "auto f = [](float v) { return v; };", "no lambdas"),
    body("capturing lambda", "auto f = [&](float v) { return v + i; };", "no lambdas"),
    body("function pointer", "float (*f)(float) = nullptr;", "no function pointers"),
    body("static variable", "static int calls = 0;", "no static variables"),
    body("thread_local variable", "thread_local int calls = 0;", "no thread_local"),
    body("standard library", "float v = std::max(1.0f, 2.0f);", "no std namespace"),
    body("character", "int c = 'a';", "string or character"),
    body("builtin of a C++ compiler", "if (__builtin_expect(i > 9, 0)) return;", "g++ understands"),
    body("reserved name, underscores", "int my__value = 1;", "reserved name"),
    body("reserved name, capital", "int _Value = 1;", "reserved name"),
    body("a word of Metal as a name", "int sampler = 1;", "word of Metal"),
    body("macro in a body", "#define TWICE(v) ((v) + (v))\n", "kernel's header"),
    body("pointer without a space", "const float* p = x;", "pointer without an address space"),
    body(
        "reference without a space",
        """
        float v = 1.0f;
        float& r = v;
""",
        "reference without",
    ),
    body("cast without a space", "float v = *(const float*)(x + i);", "pointer without"),
    body(
        "reinterpret_cast without a space",
        "auto p = reinterpret_cast<const float4*>(x);",
        "pointer without",
    ),
    body(
        "template parameter's pointer without a space",
        "vec<float, 4>* p = nullptr;",
        "pointer without",
    ),
    body("device to threadgroup", "threadgroup const float* p = x;", "device memory where"),
    body(
        "threadgroup to device",
        """
        threadgroup float t[4];
        device float* p = t;
""",
        "threadgroup memory where",
    ),
    body("address of device memory as thread", "thread float* p = &y[0];", "device memory where"),
    body("cast between spaces", "auto p = (threadgroup float*)y;", "a cast of device"),
    body("reference to another space", "thread float& r = y[i];", "device memory where"),
    body("shape as device memory", "const device int* s = x_shape;", "constant memory where"),
    helper("double in a helper", "inline float f(float v) { return v * double(2); }", "no double"),
    helper(
        "recursion",
        "inline float f(float v) { return v < 1.0f ? v : f(v - 1.0f); }",
        "no recursion",
    ),
    helper(
        "recursion of two",
        """
        inline float g(float v);
        inline float f(float v) { return g(v); }
        inline float g(float v) { return f(v); }
""",
        "no recursion",
    ),
    helper(
        "parameter without a space",
        "inline float f(const float* p) { return p[0]; }",
        "pointer without",
    ),
    helper(
        "reference parameter without a space",
        "inline void f(float& v) { v = 0.0f; }",
        "reference without",
    ),
    helper(
        "template parameter without a space",
        """
        template <typename U>
        inline U f(const U* p) { return p[0]; }
""",
        "pointer without",
    ),
    helper("mutable global", "float table[2] = {1.0f, 2.0f};", "must be `constant`"),
    helper("constant without its space", "constexpr int TABLE[2] = {1, 2};", "must be `constant`"),
    helper(
        "threadgroup storage in a helper",
        "inline float f(float v) { threadgroup float t[32]; t[0] = v; return t[0]; }",
        "only be declared in a kernel",
    ),
    helper(
        "virtual function", "struct S { virtual float f(float v) { return v; } };", "no virtual"
    ),
    helper(
        "static in a helper",
        "inline int f() { static int n = 0; return n; }",
        "no static variables",
    ),
    helper(
        "device array to a helper for threadgroup memory",
        "inline float f(threadgroup const float* p) { return p[0]; }",
        "device memory where",
        "float v = f(x);",
    ),
    helper(
        "few numbers to a helper for device memory",
        "inline float f(const device float* p) { return p[0]; }",
        "constant memory where",
        "float v = f(few);",
    ),
    helper(
        "private array to a helper for threadgroup memory",
        "inline float f(threadgroup float* p) { return p[0]; }",
        "device memory where",
        "float v = f(y + 1);",
    ),
    helper(
        "cast in a helper",
        "inline float f(const device float* p) { return *(threadgroup const float*)p; }",
        "a cast of device",
    ),
]

# Refused by nobody.
LEGAL = [
    body(
        "pointers to threadgroup memory",
        """
        threadgroup float tile[4][32], edge;
        const threadgroup float* p = tile[0];
        threadgroup const float* q = &tile[1][2];
        threadgroup float (*rows)[32] = tile;
        threadgroup float& corner = edge;
        if (i == 0) { corner = 0.0f; rows[1][0] = 1.0f; }
        float v = i == 0 ? edge + q[-2] : float(p == q);
        """,
    ),
    body(
        "vectors of every type",
        """
        const device half4* h = reinterpret_cast<const device half4*>(x);
        float4 acc = 0.0f;
        acc += 2.0f * float4(h[0]);
        acc = fma(acc, float4(i), acc) + metal::exp(-acc * acc);
        bfloat4 b = bfloat4(acc);
        acc.xy = float2(b.zw) + acc.xy * 2.0f;
        half2 two = half2(acc.lo) * half(0.5h);
        uint2 bits = uint2(as_type<uint>(two), i) >> 1;
        float v = any(acc < 0.0f) ? acc.x : dot(acc, acc) + bits.y;
        """,
    ),
    helper(
        "references to arrays and loops to unroll",
        """
        template <typename U, int N>
        METAL_FUNC U total(thread const U (&v)[N]) {
          U sum = 0;
          MLX_MTL_PRAGMA_UNROLL
          for (int i = 0; i < N; ++i) { sum += v[i]; }
          return sum;
        }
        enum Mode : ushort { kOne = 1, kTwo };
        """,
        "",
        """
        float some[3] = {1.0f, 2.0f, x[i]};
        thread auto& first = some[0];
        float v = total(some) + first;
        switch (kOne) { case kOne: v += 1.0f; break; default: break; }
        """,
    ),
    body(
        "matrices from both memories",
        """
        threadgroup half tile[64];
        for (uint k = i; k < 64; k += 64) { tile[k] = half(x[k]); }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        simdgroup_half8x8 a;
        simdgroup_float8x8 b, c = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
        simdgroup_load(a, tile, 8);
        simdgroup_load(b, x, 8);
        simdgroup_multiply_accumulate(c, a, b, c);
        thread float2& mine = reinterpret_cast<thread float2&>(c.thread_elements());
        mine *= 2.0f;
        """,
    ),
    body(
        "auto pointers",
        """
        auto p = x + i;
        auto q = p;
        float v = q[0];
""",
        "",
    ),
    body(
        "pointers with their spaces",
        """
        const device float* p = x + 1;
        thread float v[2] = {1.0f};
        thread float* q = v;
        q[0] = p[0];
""",
        "",
    ),
    body(
        "products that look like pointers",
        "uint n = 2;\nfloat a = x[i] * n;\nfloat b = a * a & 1 ? a : a;".replace(
            "a * a & 1", "uint(a) & n"
        ),
        "",
    ),
    body(
        "casts with their spaces",
        """
        const device float4* p = (const device float4*)x;
        auto q = reinterpret_cast<device float2*>(y);
""",
        "",
    ),
    body(
        "threadgroup pointer",
        """
        threadgroup float t[2][32];
        threadgroup float* row = t[i & 1];
        threadgroup float* p = &t[1][0];
        row[0] = 1.0f;
        p = row;
""",
        "",
    ),
    body(
        "unsigned words and sizes",
        """
        unsigned int a = 1;
        long b = 2;
        size_t c = a + b;
""",
        "",
    ),
    body(
        "names that only begin like Metal's", "int device_id = 1, kernel_size = 2, newer = 3;", ""
    ),
    body(
        "constants",
        """
        constexpr int L = 4;
        float v[L];
        const float w = M_PI_F;
        v[0] = w;
""",
        "",
    ),
    body(
        "comments with anything",
        """
        // double* goto new std::vector, 'a' and "b"
        /* int* p; */
""",
        "",
    ),
    helper(
        "helpers for two spaces",
        """
        inline float f(const device float* p) { return p[0]; }
        inline float g(threadgroup const float* p) { return p[0]; }
""",
        "",
        """
        threadgroup float t[1];
        t[0] = 1.0f;
        float v = f(x) + g(t);
""",
    ),
    helper(
        "template over the pointer",
        """
        template <typename P>
        inline float f(P p) { return p[0]; }
""",
        "",
        "float v = f(x) + f(few);",
    ),
    helper(
        "references with their spaces",
        "inline void f(thread float& v, device float& w) { v = w; }",
        "",
        """
        float v;
        y[i] = 0.0f;
        f(v, y[i]);
""",
    ),
    helper(
        "constants outside of functions",
        """
        constant constexpr int N = 4;
        constant float TABLE[2] = {1.0f, 2.0f};
        static constant constexpr float C = 2.0f;
""",
        "",
        "float v = TABLE[i & 1] + C + N;",
    ),
    helper(
        "structures",
        """
        struct Pair {
          float a;
          float b;
          float sum() const thread { return a + b; }
        };
        using Other = Pair;
        typedef vec<float, 2> Two;
""",
        "",
        """
        Pair pair = {1.0f, 2.0f};
        float v = pair.sum();
""",
    ),
    helper(
        "a helper that calls another overload",
        """
        inline float f(float a, float b) { return a + b; }
        inline float f(float a) { return f(a, a); }
""",
        "",
        "float v = f(x[i]);",
    ),
    helper("macros in the header", "#define TWICE(v) ((v) + (v))", "", "float v = TWICE(x[i]);"),
]

# Refused by the compiler: the shim does not have it, or has it as strictly as Metal.
COMPILER = [
    body("expf", "float v = expf(x[i]);", "expf"),
    body("erf", "float v = metal::erf(x[i]);", "erf"),
    body("expm1", "float v = metal::expm1(x[i]);", "expm1"),
    body("a variable-length array", "float v[i];", "variable length"),
    body("if constexpr", "if constexpr (true) { y[i] = 0.0f; }", "c++17"),
    body(
        "structured binding",
        """
        const float v[2] = {1.0f, 2.0f};
        auto [a, b] = v;
""",
        "c++17",
    ),
    body("float to bfloat without a cast", "bfloat b = x[i];", "bfloat"),
    body("mixed minimum", "float v = min(x[i], i);", "ambiguous"),
    body("half with float minimum", "float v = min(half(1), x[i]);", "ambiguous"),
    body(
        "64-bit shuffle by the library",
        "auto v = metal::simd_shuffle(ulong(i), ushort(1));",
        "simd_shuffle",
    ),
    body(
        "store through a pointer to const",
        """
        const device float* p = x;
        p[0] = 1.0f;
""",
        "read-only",
    ),
    body("7x7 matrices", "simdgroup_matrix<float, 7, 7> m;", "only 8x8"),
    body("as_type of another size", "auto v = as_type<half>(x[i]);", "one size"),
    helper(
        "overloads by address space",
        """
        inline float f(const device float* p) { return p[0]; }
        inline float f(threadgroup const float* p) { return p[0]; }
""",
        "redefinition",
    ),
    helper("a name of MLX's preamble", "inline float log1p(float v) { return v; }", "redefinition"),
    helper(
        "an attribute in a helper",
        "inline uint f() { return thread_position_in_grid.x; }",
        "not declared",
    ),
]
