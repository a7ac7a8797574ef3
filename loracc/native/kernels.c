/* loracc._kernels: the inner loop of a fold, for weights whose change is one product of two factors.

   Optional: where it was not built, or the processor lacks the instructions, loracc.kernel says so and numpy computes
   the same. Only the stable ABI of Python 3.11 is used; nothing here allocates. */

#define Py_LIMITED_API 0x030b0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef int (*fold_fn)(void *, ptrdiff_t, ptrdiff_t, ptrdiff_t, const void *, const void *, ptrdiff_t);

/* One dtype on this processor: columns of a packed panel (0: there is no kernel), and bytes of the elements. */
typedef struct {
    int width, stored, sum;
    fold_fn fold;
} kernel;

static kernel bf16 = {0, 2, 4, NULL}, f32 = {0, 4, 8, NULL};

#if defined(__GNUC__) && (defined(__x86_64__) || defined(__aarch64__))

#define CAT_(a, b) a##_##b
#define CAT(a, b) CAT_(a, b)
#define NAME(x) CAT(x, INSTANCE)
/* Every loop over the sums of a strip: they are registers only if no index is left at run time. */
#define UNROLL _Pragma("GCC unroll 8")
#define USE(kernel, instance) (kernel.width = width_##instance, kernel.fold = fold_##instance)

#ifdef __x86_64__

#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))
#define VECTOR 64
#define ROWS 6
#define VECS 4
#define INSTANCE avx512_bf16
#define BF16 1
#include "fold.inc"
#define INSTANCE avx512_f32
#define BF16 0
#include "fold.inc"
#undef TARGET
#undef VECTOR
#undef ROWS
#undef VECS

#define TARGET __attribute__((target("avx2,fma")))
#define VECTOR 32
#define ROWS 4
#define VECS 2

#else /* aarch64 always has fused multiply-adds on vectors */

#define TARGET
#define VECTOR 16
#define ROWS 4
#define VECS 4

#endif

#define INSTANCE plain_bf16
#define BF16 1
#include "fold.inc"
#define INSTANCE plain_f32
#define BF16 0
#include "fold.inc"

static void choose(void)
{
#ifdef __x86_64__
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma"))
        return;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
        USE(bf16, avx512_bf16);
        USE(f32, avx512_f32);
        return;
    }
#endif
    USE(bf16, plain_bf16);
    USE(f32, plain_f32);
}

#else

static void choose(void) {}

#endif

static int is_bf16(const char *name) { return strcmp(name, "bfloat16") == 0; }

/* width(dtype) -> columns of a panel of the right factor, 0 where there is no kernel. */
static PyObject *width(PyObject *self, PyObject *arguments)
{
    const char *name;
    if (!PyArg_ParseTuple(arguments, "s", &name))
        return NULL;
    return PyLong_FromLong(is_bf16(name) ? bf16.width : strcmp(name, "float32") == 0 ? f32.width : 0);
}

/* fold(dtype, weight, offset, rows, columns, stride, left, packed, rank) -> whether every result is finite. */
static PyObject *fold(PyObject *self, PyObject *arguments)
{
    const char *name;
    Py_buffer weight, left, packed;
    Py_ssize_t offset, rows, columns, stride, rank;
    if (!PyArg_ParseTuple(arguments, "sw*nnnny*y*n", &name, &weight, &offset, &rows, &columns, &stride, &left, &packed,
                          &rank))
        return NULL;
    const kernel *with = is_bf16(name) ? &bf16 : &f32;
    int finite = -1;
    if (with->width == 0)
        PyErr_SetString(PyExc_RuntimeError, "no kernel on this processor");
    else if (offset < 0 || rows < 0 || columns < 0 || rank < 0 || stride < columns)
        PyErr_SetString(PyExc_ValueError, "negative sizes, or rows that overlap");
    else if (rows > 0 && weight.len / with->stored < offset + (rows - 1) * stride + columns)
        PyErr_SetString(PyExc_ValueError, "the weight's buffer is too short");
    else if (left.len != rows * rank * with->sum)
        PyErr_SetString(PyExc_ValueError, "the left factor's buffer has another length");
    else if (packed.len != (columns + with->width - 1) / with->width * with->width * rank * with->sum)
        PyErr_SetString(PyExc_ValueError, "the packed factor's buffer has another length");
    else {
        Py_BEGIN_ALLOW_THREADS
        finite = with->fold((char *)weight.buf + offset * with->stored, rows, columns, stride, left.buf, packed.buf,
                            rank);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&weight);
    PyBuffer_Release(&left);
    PyBuffer_Release(&packed);
    return finite < 0 ? NULL : PyBool_FromLong(finite);
}

static PyMethodDef methods[] = {
    {"width", width, METH_VARARGS, "Columns of a panel of the right factor, by dtype; 0 where there is no kernel."},
    {"fold", fold, METH_VARARGS, "weight += left @ right in place, rounded once; whether every result is finite."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_kernels", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__kernels(void)
{
    choose();
    return PyModule_Create(&module);
}
